"""embed: correct vectors in the correct order, and a reason for every image that is left out."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from pipeline import embed
from pipeline.pictures import embedding
from pipeline.recipe import EmbedConfig
from pipeline.runtime.workers import Workers
from retrieval import Root, UserError
from retrieval.clip.encoder import Encoder
from retrieval.config import ResourcesConfig
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from tests.pipeline.conftest import pictures, write_clip, write_download
from tests.pipeline.shards_in_process import recorded_workers

CONFIG = EmbedConfig(workers=2, batch_size=3)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Two shards with a failed URL, an unreadable file, and database copies of training pictures."""
    train = pictures("train", 1, 7)
    database = pictures("database", 100, 8)
    train[2] = replace(train[2], reason="not_found")
    train[4] = replace(train[4], data=b"this is no picture")
    database[3] = replace(database[3], seed=train[0].seed)
    train[1] = replace(train[1], phash=0x123456789ABCDEF)
    database[5] = replace(database[5], phash=0x123456789ABCDEF ^ 0b111111)
    database[6] = replace(database[6], phash=0x123456789ABCDEF ^ 0b1111111)
    write_download(Root(tmp_path), {"train/00000": train, "database/00000": database})
    return Root(tmp_path)


def embedded(root: Root, shard: str) -> tuple[list[str], np.ndarray]:
    table = schema.read_table(root, f"embed/{shard}.parquet", schema.embeddings(32))
    return table["url"].to_pylist(), schema.vectors(table, schema.EMBEDDING).astype(np.float32)


@pytest.mark.usefixtures("in_process_shards")
def test_each_image_gets_its_own_vector_in_the_order_of_the_download(root: Root, clip: ClipConfig) -> None:
    manifest = embed.run(CONFIG, clip, root)
    assert [*manifest.values["clip_files"]] == ["open_clip_model.safetensors"]
    urls, vectors = embedded(root, "train/00000")
    readable = [p for i, p in enumerate(pictures("train", 1, 7)) if i not in (2, 4)]
    assert urls == [picture.url for picture in readable]
    images = [Image.open(io.BytesIO(picture.jpeg)) for picture in readable]
    raw = Encoder(clip).encode_images(images, unit=False)
    lengths = np.linalg.norm(raw, axis=1)
    np.testing.assert_allclose(vectors, raw / lengths[:, None], atol=2e-3)
    table = schema.read_table(root, "embed/train/00000.parquet", schema.embeddings(32))
    np.testing.assert_allclose(table[schema.NORM].to_numpy(), lengths, rtol=1e-4)
    assert np.ptp(lengths) > 1e-3
    stored = schema.read_table(root, "download/train/00000.parquet", schema.DOWNLOADED)
    stored = stored.filter(pc.is_in(stored["url"], pa.array(urls)))
    assert table["source_similarity"].equals(stored["similarity"])
    assert table["aesthetic"].equals(stored["aesthetic"])
    assert table["language"].equals(stored["language"])


def test_vectors_equal_those_of_open_clips_own_loop_and_bf16_is_close(clip: ClipConfig) -> None:
    images = [Image.open(io.BytesIO(picture.jpeg)) for picture in pictures("train", 1, 6)]
    images[2] = images[2].convert("L").resize((90, 31))
    model, _, preprocess = open_clip.create_model_and_transforms(clip.model)
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(image) for image in images])).numpy()
    np.testing.assert_array_equal(Encoder(clip).encode_images(images, unit=False), expected)
    in_bf16 = Encoder(clip, precision="bf16").encode_images(images, unit=False)
    # The features of the tiny model are small differences.
    assert 0 < np.abs(in_bf16 - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.usefixtures("in_process_shards")
def test_images_left_out_are_counted_by_reason(root: Root, clip: ClipConfig) -> None:
    manifest = embed.run(CONFIG, clip, root)
    assert manifest.rows == 5 + 6
    assert manifest.reasons == {"duplicate_content": 1, "near_copy": 1, "unreadable": 1}
    kept = [f"http://example.org/database/{i}.jpg" for i in (100, 101, 102, 104, 106, 107)]
    assert embedded(root, "database/00000")[0] == kept


@pytest.mark.usefixtures("in_process_shards")
def test_the_search_for_copies_can_have_other_workers_than_the_encoder(root: Root, clip: ClipConfig) -> None:
    on_cpus = CONFIG.model_copy(update={"near_copies": ResourcesConfig(workers=3, nodes="cpu", memory_gb=4.0)})
    searches, fingerprints = [], []
    for config in (CONFIG, on_cpus):
        with recorded_workers() as passes:
            fingerprints.append(embed.run(config, clip, root).fingerprint)
        assert {workers for stage, workers in passes if stage == "embed"} == {Workers(2)}
        searches.append({workers for stage, workers in passes if stage == "near_copies"})
        root.delete("embed")
        root.delete("near_copies")
    assert searches == [{Workers(2)}, {Workers(3, nodes="cpu", memory_gb=4.0)}]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.usefixtures("in_process_shards")
def test_batch_size_changes_neither_vectors_nor_fingerprint(root: Root, clip: ClipConfig) -> None:
    first = embed.run(CONFIG, clip, root)
    _, vectors = embedded(root, "train/00000")
    assert embed.run(EmbedConfig(workers=1, batch_size=64), clip, root).seconds == first.seconds
    root.delete("embed")
    assert embed.run(EmbedConfig(workers=1, batch_size=64), clip, root).fingerprint == first.fingerprint
    np.testing.assert_allclose(embedded(root, "train/00000")[1], vectors, atol=1e-3)


@pytest.mark.usefixtures("in_process_shards")
def test_vectors_of_cpus_are_not_continued_in_bf16_on_gpus(root: Root, clip: ClipConfig) -> None:
    embed.run(CONFIG, clip, root)
    root.delete("embed/manifest.json")  # as if the stage had not finished
    with pytest.raises(UserError, match=r"2 finished shards.*made from another precision\. They are kept"):
        embed.run(CONFIG.model_copy(update={"gpus_per_worker": 1.0}), clip, root)
    assert embed.run(CONFIG, clip, root).rows == 5 + 6


@pytest.mark.usefixtures("in_process_shards")
def test_another_encoder_embeds_every_image_again(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    first = embed.run(CONFIG, clip, root)
    second = embed.run(CONFIG, write_clip(tmp_path / "other", seed=1), Root(root.url, remake=True))
    assert second.fingerprint != first.fingerprint
    assert second.checksums() != first.checksums()


@pytest.mark.usefixtures("in_process_shards")
def test_a_tar_damaged_in_the_middle_is_refused(root: Root, clip: ClipConfig) -> None:
    path = root.local_path("download/database/00000.tar")
    data = bytearray(path.read_bytes())
    second = data.index(b".jpg", 512 + 100) - 20
    data[second : second + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"has 1 of its 6 pictures"):
        embed.run(CONFIG, clip, root)


@pytest.mark.usefixtures("in_process_shards")
def test_a_deleted_shard_is_embedded_again(root: Root, clip: ClipConfig) -> None:
    first = embed.run(CONFIG, clip, root)
    root.delete("embed/train/00000.parquet")
    assert embed.run(CONFIG, clip, root).checksums() == first.checksums()
    assert root.exists("embed/train/00000.parquet")


@pytest.mark.usefixtures("in_process_shards")
def test_a_corrupt_tar_stops_the_stage_and_is_named(root: Root, clip: ClipConfig) -> None:
    root.local_path("download/database/00000.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"download/database/00000\.tar.*not a readable tar"):
        embed.run(CONFIG, clip, root)
    assert not root.exists("embed/manifest.json")


def test_an_error_of_the_encoder_is_no_unreadable_picture() -> None:
    class FailingEncoder:
        def pixels(self, image: Image.Image) -> None:
            raise RuntimeError("not enough memory")

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    encoder = cast(Encoder, FailingEncoder())
    with pytest.raises(RuntimeError, match="not enough memory"):
        embedding._decode(encoder, buffer.getvalue())
    assert embedding._decode(encoder, buffer.getvalue()[:100]) is None


def test_openai_weights_with_the_wrong_activation_are_refused() -> None:
    with pytest.raises(UserError, match="ViT-L-14-quickgelu"):
        Encoder(ClipConfig(model="ViT-L-14", pretrained="openai"))


@pytest.mark.parametrize("model", ["local-dir:nowhere", "ViT-B-32"])
def test_a_missing_model_is_an_error_that_names_the_section(model: str) -> None:
    with pytest.raises(UserError, match=r"\[clip\]"):
        Encoder(ClipConfig(model=model))


@pytest.mark.usefixtures("in_process_shards")
def test_a_compiled_encoder_gets_batches_of_one_size_and_gives_the_same_vectors(
    root: Root, clip: ClipConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed.run(CONFIG, clip, root)
    expected = [embedded(root, shard) for shard in ("train/00000", "database/00000")]
    root.delete("embed")
    batch_sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        # The graph is traced as in use; only code generation, which takes minutes, is left out.
        batch_sizes.extend(len(value) for value in inputs if value.shape[1:] == (3, 32, 32))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    embed.run(CONFIG.model_copy(update={"compile": True, "workers": 1}), clip, root)
    assert batch_sizes == [CONFIG.batch_size]
    for shard, (urls, vectors) in zip(("train/00000", "database/00000"), expected, strict=True):
        compiled_urls, compiled = embedded(root, shard)
        assert compiled_urls == urls
        np.testing.assert_allclose(compiled, vectors, atol=2e-3)
