"""Aspect-ratio buckets: their shapes, the bucket of an image, and batches from latents and pictures."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.data.test_loader import assert_equal
from tests.trainer.training.launched import folder_of, train
from tests.trainer.training_set import (
    NAMES,
    ROWS,
    VIEWS,
    all_ids,
    ids_of,
    make_recipe,
    plan_of,
    png,
    write_latents,
    write_stage,
    write_tar,
)
from trainer.data.aspect import bucket_shapes, nearest_bucket, read_buckets
from trainer.data.batch_order import BatchOrder, bucket_rows
from trainer.data.latents import make_shard_encoder, manifest_values
from trainer.data.loader import Loader
from trainer.data.sample_order import SampleOrder
from trainer.evaluation.paper.held_out import held_out_losses
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import LatentsConfig
from trainer.tracking.training_log import METRICS, VALIDATION, ValidationMetrics, read_entries, read_step_metrics
from trainer.training.objective import Objective
from trainer.training.validation import fixed_batch, held_out_rows, parts_of_one_shape, read_held_out

STEP = 16
SIZES = ((96, 80), (60, 100), (300, 100))
"""Width and height of the pictures, in turns: of a square, a tall and a wide bucket."""


def test_shapes_have_edges_in_steps_areas_within_the_square_and_ratios_up_to_2() -> None:
    assert bucket_shapes(64, 0) == ((64, 64),)
    assert bucket_shapes(64, 16) == ((80, 48), (64, 64), (48, 80))
    assert bucket_shapes(256, 32) == ((320, 192), (288, 224), (256, 256), (224, 288), (192, 320))
    for size, step in ((256, 32), (512, 64), (768, 64), (512, 128), (768, 128)):
        shapes = bucket_shapes(size, step)
        assert (size, size) in shapes
        assert {(width, height) for height, width in shapes} == set(shapes)
        for height, width in shapes:
            assert height % step == width % step == 0
            assert height * width <= size**2
            assert max(height, width) <= 2 * min(height, width)
            # No edge could be a step longer.
            assert (min(height, width) + step) * max(height, width) > size**2
    with pytest.raises(UserError, match="aspect_step must divide size 64, got 24"):
        bucket_shapes(64, 24)
    with pytest.raises(UserError, match="aspect_step 128 gives no shape but the square of 256 px"):
        bucket_shapes(256, 128)


def test_an_image_is_in_the_bucket_of_the_nearest_ratio() -> None:
    shapes = bucket_shapes(64, 16)
    widths, heights = np.array([[64, 64], [480, 800], [800, 480], [1, 9], [90, 80], [80, 60], [83, 60]]).T
    assert nearest_bucket(widths, heights, shapes).tolist() == [1, 0, 2, 0, 1, 2, 2]


@pytest.mark.parametrize("batch", [4, 7, 16])
def test_every_epoch_of_a_bucket_has_each_sample_once_and_batches_carry_the_rest_over(batch: int) -> None:
    rows = ((5, 9, 0), (20, 3, 8), (0, 1, 2), (0, 0, 0))
    order = BatchOrder(tuple(SampleOrder(each, 1, 4) for each in rows), batch, 1)
    steps = order.first_step(12)
    batches = [order.locate(step) for step in range(steps)]
    for bucket, samples in enumerate(map(sum, rows)):
        firsts = sorted(first for other, first in batches if other == bucket)
        # Batches are consecutive, none is missing, and in 12 epochs less than a batch is left over.
        assert firsts == list(range(0, len(firsts) * batch, batch))
        assert 12 * samples - batch < len(firsts) * batch <= 12 * samples


def test_buckets_advance_at_an_even_rate_and_read_the_same_shards() -> None:
    shards = 64
    common, rare = (SampleOrder((count,) * shards, 1, 4) for count in (90, 10))
    order = BatchOrder((common, rare), 16, 1)
    steps = order.first_step(1)
    done = np.zeros(2)
    for step in range(steps):
        bucket, _ = order.locate(step)
        done[bucket] += 1
        shares = done / [order.finished(number, 1) for number in (0, 1)]
        assert abs(shares[0] - shares[1]) < 0.04
    second = [order.locate(step)[0] for step in range(steps, order.first_step(2))]
    assert second != [order.locate(step)[0] for step in range(steps)]


def write_sizes(root: Root, pictures: tuple[tuple[int, int], ...] = SIZES) -> None:
    """The stage `embed` with the sizes of the pictures, in another order than the neighbors."""
    layout, records = schema.embeddings(8), []
    for number, name in enumerate(NAMES):
        ids = ids_of(number)[::-1].tolist()
        count = len(ids)
        sizes = [pictures[row % 3] for row in range(count)][::-1]
        columns = {
            schema.IMAGE_ID: ids,
            "url": [""] * count,
            "caption": [""] * count,
            "license": [None] * count,
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
            schema.NORM: [None] * count,
            schema.EMBEDDING: schema.fixed_lists(np.zeros((count, 8), np.float16)),
        }
        file = schema.write_table(root, f"embed/train/{name}.parquet", pa.table(columns, schema=layout), layout)
        records.append(ShardRecord(f"train/{name}", count, (file,)))
    write_manifest(root, Manifest("embed", schema.VERSION, "", {}, {}, records, {}, 0.0))


def mark_as_made_from_embed(root: Root, *stages: str) -> None:
    """Write the present identity of `embed` into manifests of later stages."""
    identity = read_manifest(root, "embed").identity_of("train/")
    for stage in stages:
        write_manifest(root, replace(read_manifest(root, stage), upstream={"embed": identity}))


def bucket_of(image_id: int) -> int:
    """The bucket of a picture of SIZES among (80, 48), (64, 64), (48, 80)."""
    return (1, 0, 2)[(image_id + (1 << 62)) % 1000 % 3]


@pytest.fixture
def bucketed(training_set: Root, autoencoder_folder: str) -> Root:
    """The training set with latents of buckets: each value of a view is the number of its image's row plus the view."""
    write_sizes(training_set)
    lengths = [4 * height * width // 64 for height, width in bucket_shapes(64, STEP)]
    for number, name in enumerate(NAMES):
        moments = np.full((ROWS[number], VIEWS, 2 * 4 * 64), 99, np.float16)
        for row, image_id in enumerate(ids_of(number).tolist()):
            for view in range(VIEWS):
                moments[row, view, : 2 * lengths[bucket_of(image_id)]] = row + view
        write_latents(training_set, name, ids_of(number), moments)
    manifest = read_manifest(training_set, "latents/64")
    write_manifest(training_set, replace(manifest, values=manifest.values | {"aspect_step": STEP}))
    mark_as_made_from_embed(training_set, "neighbors", "latents/64")
    return training_set


def loader_of(root: Root, autoencoder_folder: str, rank: int = 0, world: int = 1, **changes: object) -> Loader:
    settings = {"aspect_step": STEP, "global_batch": 6, "interleaved_shards": 2, "p_uncond": 0.0} | changes
    return Loader(plan_of(autoencoder_folder, root, **settings), root, rank, world)


def test_batches_have_one_shape_the_images_of_it_and_their_neighbors(bucketed: Root, autoencoder_folder: str) -> None:
    loader = loader_of(bucketed, autoencoder_folder)
    shapes = [(8, height // 8, width // 8) for height, width in bucket_shapes(64, STEP)]
    contexts = {
        int(image_id): context
        for number in range(3)
        for image_id, context in zip(loader.shard(number).ids, loader.shard(number).context, strict=True)
    }
    views: dict[int, set[int]] = {image_id: set() for image_id in all_ids()}
    steps = loader.order.first_step(2)
    for step in range(steps):
        batch = loader.batch(step)
        [bucket] = {bucket_of(image_id) for image_id in batch.image_ids.tolist()}
        assert batch.inputs.shape[1:] == shapes[bucket]
        assert batch.noise.shape[1:] == batch.posterior_noise.shape[1:] == (4, *shapes[bucket][1:])
        for image_id, inputs, context in zip(batch.image_ids.tolist(), batch.inputs, batch.context, strict=True):
            [value] = set(inputs.flatten().tolist())
            views[image_id].add(int(value) - (image_id + (1 << 62)) % 1000)
            np.testing.assert_array_equal(context, contexts[image_id])
    # Epoch e uses view e. Images that did not fill a batch have not had their second view, less than 6 of each bucket.
    assert set().union(*views.values()) == {0, 1}
    assert sum(map(len, views.values())) == 6 * steps > 2 * len(views) - 3 * 6


@pytest.mark.parametrize("world", [2, 3])
def test_batches_of_buckets_do_not_depend_on_ranks_or_on_the_step_of_a_resumed_run(
    bucketed: Root, autoencoder_folder: str, world: int
) -> None:
    single = loader_of(bucketed, autoencoder_folder)
    ranks = [loader_of(bucketed, autoencoder_folder, rank, world) for rank in range(world)]
    for step in (0, 5, 17):
        whole = single.batch(step)
        shares = [loader.batch(step) for loader in ranks]
        for name in ("inputs", "noise", "context", "timesteps"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    resumed = list(loader_of(bucketed, autoencoder_folder, workers=3).batches(9, 14))
    for step, batch in enumerate(resumed, start=9):
        assert_equal(batch, single.batch(step))
    with pytest.raises(UserError, match=r"train\.global_batch was changed .* aspect-ratio buckets"):
        Loader(plan_of(autoencoder_folder, bucketed, aspect_step=STEP), bucketed, 0, 1, shift=3)


def test_sizes_of_another_embed_than_that_of_the_latents_and_neighbors_are_refused(
    bucketed: Root, autoencoder_folder: str
) -> None:
    before = plan_of(autoencoder_folder, bucketed, aspect_step=STEP)
    write_sizes(bucketed, pictures=(SIZES[1], SIZES[0], SIZES[2]))
    for stage in ("neighbors", "latents/64"):
        with pytest.raises(UserError, match=rf"{stage} was made from another output of embed.*'make {stage[:7]}"):
            plan_of(autoencoder_folder, bucketed, aspect_step=STEP)
        mark_as_made_from_embed(bucketed, stage)
    # A run does not go on with other buckets.
    assert plan_of(autoencoder_folder, bucketed, aspect_step=STEP).checkpoint_identity != before.checkpoint_identity


def test_the_images_of_buckets_are_counted_once_and_again_for_other_sizes(
    bucketed: Root, autoencoder_folder: str
) -> None:
    def rows(**changes: object) -> list[list[int]]:
        return bucket_rows(plan_of(autoencoder_folder, bucketed, aspect_step=STEP, **changes), bucketed)

    counts, fewer = rows(), rows(validation_images=7)
    assert np.sum(counts) == len(all_ids()) == np.sum(fewer) + 7
    for folder in ("neighbors", "embed/train"):
        for file in bucketed.list(folder, ".parquet"):
            bucketed.delete(file)
    assert rows() == counts
    assert rows(validation_images=7) == fewer
    write_sizes(bucketed, pictures=(SIZES[1], SIZES[0], SIZES[2]))
    mark_as_made_from_embed(bucketed, "neighbors", "latents/64")
    with pytest.raises(UserError, match="neighbors"):
        rows()


def test_held_out_images_of_one_shape_are_read_together(bucketed: Root, autoencoder_folder: str) -> None:
    plan = plan_of(autoencoder_folder, bucketed, aspect_step=STEP, validation_images=7)
    loader, rows = Loader(plan, bucketed, 0, 1), held_out_rows(plan.training_set)
    parts = parts_of_one_shape(loader, rows, 2)
    assert sorted(index for part in parts for index in part) == list(range(7))
    for part in parts:
        held_out = read_held_out(plan, loader, [rows[index] for index in part], None)
        [bucket] = {bucket_of(image_id) for image_id in held_out.image_ids.tolist()}
        assert held_out.latent_shape[1:] == tuple(edge // 8 for edge in bucket_shapes(64, STEP)[bucket])


def test_the_effect_of_neighbors_on_held_out_images_is_measured_in_all_shapes(
    bucketed: Root, autoencoder_folder: str
) -> None:
    plan = plan_of(autoencoder_folder, bucketed, aspect_step=STEP, validation_images=7)
    loader, autoencoder = Loader(plan, bucketed, 0, 1), Autoencoder.load(plan.config.autoencoder, "cpu")
    objective = Objective(plan.config.diffusion, None, torch.device("cpu"))

    class Sum(torch.nn.Linear):
        def forward(self, x_t: torch.Tensor, _: torch.Tensor, context: torch.Tensor, **__: Any) -> tuple[torch.Tensor]:
            return (x_t + context.mean(dim=(1, 2)).view(-1, 1, 1, 1),)

    losses = held_out_losses(Sum(1, 1), plan, loader, autoencoder, 4)
    for index, row in enumerate(held_out_rows(plan.training_set)):
        image = read_held_out(plan, loader, [row], None)
        for draw in range(4):
            alone = objective(Sum(1, 1), fixed_batch(image, [4 * index + draw], plan), torch.float32)
            assert losses["true"][index, draw] == pytest.approx(alone.item(), rel=1e-5)


def test_a_run_with_buckets_validates_and_draws_on_any_number_of_ranks(bucketed: Root, autoencoder_folder: str) -> None:
    changes = {"aspect_step": STEP, "steps": 4, "global_batch": 4, "validation_images": 7}
    changes |= {"validate_every": 2, "preview_every": 4}
    losses = []
    for ranks, zero_stage in ((2, 3), (1, 1)):
        recipe = make_recipe(autoencoder_folder, name=f"run{ranks}", zero_stage=zero_stage, **changes)
        log = train(recipe, bucketed, ranks)
        assert "in 3 aspect ratios" in log
        assert log.count("counting the images of 3 aspect ratios") == (ranks == 2)  # on rank 0, for both runs
        folder = folder_of(recipe, bucketed)
        steps, validations = read_step_metrics(folder / METRICS), read_entries(folder / VALIDATION, ValidationMetrics)
        losses.append([entry.loss for entry in (*steps, *validations)])
        assert (folder / "previews/00000004.png").exists()
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def picture(size: tuple[int, int], number: int) -> Image.Image:
    """A picture whose red channel rises from left to right; the green channel identifies it."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 250, size[0])
    pixels[..., 1] = number
    return Image.fromarray(pixels)


def write_pictures(root: Root) -> None:
    for number, name in enumerate(NAMES):
        ids = ids_of(number).tolist()
        members = {schema.sample_key(each) + ".jpg": png(picture(SIZES[i % 3], i)) for i, each in enumerate(ids)}
        write_tar(root, name, members)
    write_stage(root, "download", {}, {})


def test_pictures_are_cropped_to_the_shape_of_their_bucket(training_set: Root, autoencoder_folder: str) -> None:
    write_sizes(training_set)
    write_pictures(training_set)
    mark_as_made_from_embed(training_set, "neighbors")
    loader = loader_of(training_set, autoencoder_folder, source="images", flip=False)
    for step in range(12):
        batch = loader.batch(step)
        for image_id, pixels in zip(batch.image_ids.tolist(), batch.inputs, strict=True):
            bucket, row = bucket_of(image_id), (image_id + (1 << 62)) % 1000
            assert pixels.shape[1:] == bucket_shapes(64, STEP)[bucket]
            assert pixels[1].mean().item() == pytest.approx(row / 127.5 - 1, abs=0.01)
            # 96 x 80 and 60 x 100 keep nearly their whole width, 300 x 100 keeps 5/9 of it.
            share = (pixels[0, :, -1] - pixels[0, :, 0]).mean().item() / 2
            assert share == pytest.approx({1: 0.82, 0: 0.97, 2: 0.54}[bucket], abs=0.05)


def test_latents_of_buckets_are_those_of_the_crops_in_the_order_of_the_table(
    training_set: Root, autoencoder_folder: str
) -> None:
    write_sizes(training_set)
    write_pictures(training_set)
    autoencoder = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu")
    config = LatentsConfig(size=64, views=1, aspect_step=STEP, batch_size=4)
    encode = make_shard_encoder(config, make_recipe(autoencoder_folder).autoencoder, training_set)
    rows = {name: encode(name).rows for name in NAMES}
    write_stage(training_set, "latents/64", rows, manifest_values(config, autoencoder))
    mark_as_made_from_embed(training_set, "neighbors", "latents/64")
    from_latents = loader_of(training_set, autoencoder_folder)
    shard = from_latents.shard(0)
    for row in (0, 1, 2, 29):
        pixels = center_of(row, bucket_shapes(64, STEP)[bucket_of(int(shard.ids[row]))])
        expected = autoencoder.encode_moments(torch.from_numpy(pixels)[None])[0]
        torch.testing.assert_close(torch.from_numpy(shard.inputs(row, 0)).float(), expected, atol=3e-2, rtol=1e-2)


def center_of(row: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The center of a picture of `write_pictures`, scaled to cover a shape."""
    image = picture(SIZES[row % 3], row)
    scale = max(shape[0] / image.height, shape[1] / image.width)
    width, height = (round(edge * scale) for edge in image.size)
    left, top = (width - shape[1]) // 2, (height - shape[0]) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + shape[1], top + shape[0]))
    return np.asarray(scaled, np.float32).transpose(2, 0, 1) / 127.5 - 1


def test_settings_that_do_not_fit_are_an_error(bucketed: Root, autoencoder_folder: str) -> None:
    with pytest.raises(UserError, match=r"train\.aspect_step must be a multiple of 16.* got 8"):
        plan_of(autoencoder_folder, bucketed, aspect_step=8)
    with pytest.raises(UserError, match=r"has latents with aspect_step 16, but train\.aspect_step is 0"):
        plan_of(autoencoder_folder, bucketed)
    with pytest.raises(ValidationError, match="compile is for batches of one shape"):
        make_recipe("", aspect_step=STEP, compile=True)
    with pytest.raises(UserError, match=r"lacks 1 images of the neighbors table, the first is 7"):
        read_buckets(bucketed, NAMES[0], np.array([7, *ids_of(0)]), bucket_shapes(64, STEP))
