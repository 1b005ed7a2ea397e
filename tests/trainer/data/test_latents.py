import io
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe, png, write_tar
from trainer.data import images, latents
from trainer.data.images import ImageTar, ScaledImage, center_crop, decode_image, random_crop
from trainer.data.latents import image_views, make_shard_encoder, manifest_values
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig

SHARD = "00000-00001"
IDS = [5, -3, 2**62]
CONFIG = LatentsConfig(size=64, views=3, seed=1, batch_size=2)


def noise(seed: int, width: int = 130, height: int = 96) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def write_shard(root: Root, contents: dict[int, bytes], embedded: list[int]) -> None:
    members = {}
    for image_id, data in contents.items():
        for suffix, member in ((".jpg", data), (".txt", b"caption"), (".json", b"{}")):
            members[f"{image_id & (2**64 - 1):016x}{suffix}"] = member
    write_tar(root, SHARD, members)
    count = len(embedded)
    columns: dict[str, object] = {
        schema.IMAGE_ID: embedded,
        "url": [""] * count,
        "caption": [""] * count,
        "license": [None] * count,
        "width": [1] * count,
        "height": [1] * count,
        schema.NORM: [None] * count,
        schema.EMBEDDING: schema.fixed_lists(np.zeros((count, 8), np.float16)),
    }
    layout = schema.embeddings(8)
    schema.write_table(root, f"embed/train/{SHARD}.parquet", pa.table(columns, schema=layout), layout)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    write_shard(root, {image_id: png(noise(i)) for i, image_id in enumerate([*IDS, 77])}, IDS)
    return root


@pytest.fixture
def autoencoder_config(autoencoder_folder: str) -> AutoencoderConfig:
    return make_recipe(autoencoder_folder).autoencoder


def read_moments(root: Root) -> np.ndarray:
    table = schema.read_table(root, f"latents/64/{SHARD}.parquet", schema.latents(3 * 8 * 8 * 8))
    assert table[schema.IMAGE_ID].to_pylist() == IDS
    return schema.vectors(table, schema.MOMENTS).reshape(3, 3, 8, 8, 8).astype(np.float32)


def test_a_shard_has_the_moments_of_every_view_in_the_order_of_embed(
    root: Root, autoencoder_config: AutoencoderConfig
) -> None:
    record = make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)
    assert (record.shard, record.rows) == (SHARD, 3)
    moments = read_moments(root)
    autoencoder = Autoencoder.load(autoencoder_config, "cpu")
    tar = ImageTar(root.local_path(f"download/train/{SHARD}.tar"))
    for row, image_id in enumerate(IDS):
        views = torch.from_numpy(np.stack(list(image_views(tar, image_id, (64, 64), CONFIG))))
        with torch.no_grad():
            expected = autoencoder.encode_moments(views)
        torch.testing.assert_close(torch.from_numpy(moments[row]), expected, atol=1e-2, rtol=1e-2)
    assert np.abs(moments[:, 1] - moments[:, 2]).max() > 0.01


def test_encoding_is_reproducible_and_independent_of_the_batch_size(
    root: Root, autoencoder_config: AutoencoderConfig
) -> None:
    first = make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)
    again = make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)
    assert first.files == again.files
    moments = read_moments(root)
    make_shard_encoder(CONFIG.model_copy(update={"batch_size": 9}), autoencoder_config, root)(SHARD)
    np.testing.assert_allclose(moments, read_moments(root), atol=2e-3)


def test_the_number_of_threads_changes_no_byte_even_if_earlier_images_take_longer(
    root: Root, autoencoder_config: AutoencoderConfig
) -> None:
    sizes = {1: 1600, 2: 800, 3: 0, 4: 400, 5: 100, 6: 64}
    contents = {image_id: png(noise(image_id, edge, edge)) if edge else b"no image" for image_id, edge in sizes.items()}
    write_shard(root, contents, list(sizes))
    one, many = (
        make_shard_encoder(CONFIG.model_copy(update={"decode_threads": threads}), autoencoder_config, root)(SHARD)
        for threads in (1, 8)
    )
    assert (one.files, one.reasons) == (many.files, many.reasons)
    assert (one.rows, one.reasons) == (5, {"unreadable": 1})


def test_decoding_stays_a_batch_ahead_and_ends_when_the_encoder_fails(
    root: Root, autoencoder_config: AutoencoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(1, 21))
    write_shard(root, {image_id: png(noise(image_id, 64, 64)) for image_id in ids}, ids)
    submitted: list[int] = []

    def recorded(read: Any, tar: ImageTar, image_id: int, *arguments: Any) -> Any:
        submitted.append(image_id)
        return partial(read, tar, image_id, *arguments)

    def fail(_: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no memory for {len(images)} views")

    monkeypatch.setattr(latents, "partial", recorded)
    monkeypatch.setattr(Autoencoder, "encode_moments", fail)
    config = CONFIG.model_copy(update={"batch_size": 6, "decode_threads": 2})  # 2 images
    with pytest.raises(RuntimeError) as error:
        make_shard_encoder(config, autoencoder_config, root)(SHARD)
    assert submitted == [1, 2, 3, 4]  # this batch and the next one
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latents")]
    error.match("no memory for 6 views")  # until here its traceback keeps the generator


def test_view_0_is_the_center_crop_and_the_others_are_seeded_random_crops(root: Root) -> None:
    tar = ImageTar(root.local_path(f"download/train/{SHARD}.tar"))
    views = list(image_views(tar, IDS[0], (64, 64), CONFIG))
    resized = noise(0).resize((87, 64), Image.Resampling.BICUBIC)
    center = np.asarray(resized, np.float32)[:, 11:75].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(views[0], center, atol=1.01 / 127.5)
    assert np.mean(views[0] == center) > 0.99
    np.testing.assert_array_equal(views[1], list(image_views(tar, IDS[0], (64, 64), CONFIG))[1])
    other_seed = list(image_views(tar, IDS[0], (64, 64), CONFIG.model_copy(update={"seed": 2})))
    assert not np.array_equal(views[1], other_seed[1])


def test_random_crops_cover_the_image_and_half_are_mirrored() -> None:
    image = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    ramp = ScaledImage(image, (100, 64), (100, 64), (64, 64))
    crops = [random_crop(ramp, (0, 0, seed), flip=True) for seed in range(200)]
    mirrored = [crop[0, 0, 0] > crop[0, 0, -1] for crop in crops]
    assert 0.4 < np.mean(mirrored) < 0.6
    lefts = {round((min(crop[0, 0, 0], crop[0, 0, -1]) + 1) * 127.5) for crop in crops}
    assert {0, 36} <= lefts <= set(range(37))
    unmirrored = [random_crop(ramp, (0, 0, seed), flip=False) for seed in range(20)]
    assert all(crop[0, 0, 0] < crop[0, 0, -1] for crop in unmirrored)


def test_resizing_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (640, 320, 3)))
    assert np.abs(center_crop(decode_image(png(stripes), "stripes", (64, 64)))).max() < 0.05


def scene(width: int, height: int) -> Image.Image:
    """Smooth waves and a disc with sharp edges, similar to a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / 23 + phase) * np.cos(y / 31 + phase) for phase in range(3)]
    waves[0][(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = 230
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize("stored", [(1003, 771), (769, 1537), (256, 256), (300, 2400)])
def test_crops_of_a_jpeg_decoded_at_reduced_size_equal_those_at_full_size(stored: tuple[int, int]) -> None:
    data = jpeg(scene(*stored))
    small = decode_image(data, "a.jpg", (256, 256))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    large = ScaledImage(whole, whole.size, small.edges, (256, 256))
    assert (small.raster.width < stored[0]) == (min(stored) >= 2 * 256 * images.MIN_DRAFT_RATIO)
    factor = round(stored[0] / small.raster.width)
    assert small.extent == (stored[0] / factor, stored[1] / factor)
    assert min(small.raster.size) >= 256 * min(images.MIN_DRAFT_RATIO, min(stored) / 256)
    for seed in range(5):
        reduced, full = (random_crop(image, (0, 0, seed), flip=True) for image in (small, large))
        assert np.sqrt(np.square(reduced - full).mean()) < 2 / 127.5


def test_a_crop_equals_the_same_part_of_the_scaled_image() -> None:
    image = decode_image(png(scene(390, 300)), "a.png", (128, 128))
    scaled = np.asarray(scene(390, 300).resize((166, 128), Image.Resampling.BICUBIC), np.float32)
    for left in (0, 17, 38):
        part = scaled[:, left : left + 128].transpose(2, 0, 1) / 127.5 - 1
        # Values halfway between two levels may be rounded differently.
        np.testing.assert_allclose(image.crop(left, 0), part, atol=1.01 / 127.5)
        assert np.mean(image.crop(left, 0) == part.astype(np.float32)) > 0.99


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_images_of_every_mode_are_converted_to_rgb(mode: str) -> None:
    data = jpeg(scene(900, 800).convert(mode)) if mode in ("L", "CMYK") else png(scene(900, 800).convert(mode))
    assert center_crop(decode_image(data, "a", (64, 64))).shape == (3, 64, 64)


def test_the_manifest_has_the_values_that_training_checks(autoencoder_config: AutoencoderConfig) -> None:
    autoencoder = Autoencoder.load(autoencoder_config, "cpu")
    values = manifest_values(CONFIG, autoencoder)
    assert values == {"autoencoder": autoencoder.identity, "shape": [4, 8, 8], "views": 3, "aspect_step": 0}
    with pytest.raises(UserError, match="no multiple of the autoencoder's factor 8"):
        manifest_values(CONFIG.model_copy(update={"size": 60}), autoencoder)


def test_a_shard_without_images_gives_an_empty_table(root: Root, autoencoder_config: AutoencoderConfig) -> None:
    write_shard(root, {}, [])
    assert make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD).rows == 0


@pytest.mark.parametrize("data", [b"no image", png(noise(0))[:5000], b""])
def test_an_image_that_cannot_be_decoded_is_left_out_and_counted(
    root: Root, autoencoder_config: AutoencoderConfig, data: bytes
) -> None:
    write_shard(root, {4: png(noise(0)), 5: data, 6: png(noise(1))}, [4, 5, 6])
    record = make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)
    assert (record.rows, record.reasons) == (2, {"unreadable": 1})
    table = schema.read_table(root, f"latents/64/{SHARD}.parquet", schema.latents(3 * 8 * 8 * 8))
    assert table[schema.IMAGE_ID].to_pylist() == [4, 6]


def test_an_embedded_image_that_is_not_in_the_tar_is_an_error(
    root: Root, autoencoder_config: AutoencoderConfig
) -> None:
    write_shard(root, {5: png(noise(0))}, [5, 6])
    with pytest.raises(UserError, match=r"has no image 6.*do not match"):
        make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)


def test_the_error_for_a_damaged_tar_names_it(root: Root, autoencoder_config: AutoencoderConfig) -> None:
    root.write_bytes(f"download/train/{SHARD}.tar", b"x" * 2000)
    with pytest.raises(UserError, match=rf"{SHARD}\.tar is not a tar of images"):
        make_shard_encoder(CONFIG, autoencoder_config, root)(SHARD)


def test_an_image_with_too_many_pixels_is_an_error_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 130 * 96 - 1)
    with pytest.raises(UserError, match="has 130 x 96 pixels"):
        # The file is truncated after the header, so decoding would raise another error.
        decode_image(png(noise(0))[:5000], "huge.png", (64, 64))
