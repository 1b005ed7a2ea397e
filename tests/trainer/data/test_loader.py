import hashlib
import io
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import (
    NAMES,
    SHAPE,
    VIEWS,
    all_ids,
    ids_of,
    make_recipe,
    write_latents,
    write_stage,
)
from trainer.data.loader import Batch, Loader
from trainer.data.plan import make_plan
from trainer.data.sample_order import rank_slots
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import Training


def loader(recipe: Training, root: Root, rank: int = 0, world: int = 1) -> Loader:
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    return Loader(make_plan(recipe, root, autoencoder), root, rank, world)


def global_batch(recipe: Training, root: Root, step: int, world: int) -> list[tuple[object, ...]]:
    """The samples of a global batch by slot, as `world` ranks together load it."""
    count = recipe.train.global_batch
    samples: dict[int, tuple[object, ...]] = {}
    for rank in range(world):
        part = loader(recipe, root, rank, world)
        batch = part.batch(step)
        slots = rank_slots(part.order, step, count, rank, world).tolist()
        noises = batch.noise.sum(dim=(1, 2, 3)).tolist()
        samples.update(
            zip(slots, zip(batch.image_ids.tolist(), batch.timesteps.tolist(), noises), strict=True)
        )
    return [samples[slot] for slot in range(count)]


def assert_same(one: Batch, other: Batch) -> None:
    assert one.image_ids.tolist() == other.image_ids.tolist()
    for name in ("inputs", "context", "timesteps", "posterior_noise", "noise"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_sees_every_sample_once_an_epoch(
    training_set: Root, autoencoder_folder: str, world: int
) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12, lanes=6)
    loaders = [loader(recipe, training_set, rank, world) for rank in range(world)]
    # 72 samples are 6 batches of 12.
    for epoch in range(2):
        seen = [one.batch(6 * epoch + step).image_ids.tolist() for step in range(6) for one in loaders]
        assert Counter(image for share in seen for image in share) == Counter(all_ids())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("lanes", [6, 5])
def test_the_global_order_and_noise_do_not_depend_on_the_number_of_ranks(
    training_set: Root, autoencoder_folder: str, world: int, lanes: int
) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12, lanes=lanes)
    for step in (0, 3, 7):
        alone = global_batch(recipe, training_set, step, 1)
        assert global_batch(recipe, training_set, step, world) == alone


def test_a_resumed_loader_goes_on_where_it_stood_with_any_number_of_threads(
    training_set: Root, autoencoder_folder: str
) -> None:
    whole = list(loader(make_recipe(autoencoder_folder), training_set).batches(0, 12))
    threads = make_recipe(autoencoder_folder, workers=5, prefetch_batches=9)
    resumed = list(loader(threads, training_set).batches(7, 12))
    assert len(resumed) == 5
    for one, other in zip(whole[7:], resumed, strict=True):
        assert_same(one, other)


def test_rows_are_joined_by_id_and_each_epoch_sees_the_next_view(
    training_set: Root, autoencoder_folder: str
) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.0)
    one = loader(recipe, training_set)
    for step in (0, 9, 18):
        batch = one.batch(step)
        mean, deviation = batch.inputs.float().chunk(2, dim=1)
        told = 5 * batch.context.float().mean(dim=(1, 2))
        torch.testing.assert_close(mean.mean(dim=(1, 2, 3)), told, atol=1e-2, rtol=1e-2)
        # 72 samples are 9 batches of 8.
        view = (step // 9) % VIEWS
        torch.testing.assert_close(deviation, torch.full_like(deviation, 0.1 * (view + 1)), atol=1e-3, rtol=0)


def test_all_neighbors_of_a_sample_are_withheld_together_at_the_stated_rate(
    training_set: Root, autoencoder_folder: str
) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.3)
    batches = [loader(recipe, training_set).batch(step) for step in range(60)]
    empty = torch.cat([(batch.context == 0).flatten(1).float().mean(dim=1) for batch in batches])
    assert set(empty.round().tolist()) == {0.0, 1.0}
    assert ((empty > 0.9) | (empty < 0.1)).all()
    assert empty.round().mean().item() == pytest.approx(0.3, abs=0.06)


def digest(one: Loader, steps: int) -> str:
    """16 hex digits over everything in the batches of the first steps."""
    found = hashlib.sha256()
    for step in range(steps):
        batch = one.batch(step)
        found.update(batch.image_ids.tobytes())
        for name in ("inputs", "context", "timesteps", "posterior_noise", "noise"):
            found.update(getattr(batch, name).numpy().tobytes())
    return found.hexdigest()[:16]


def test_batches_are_what_they_were_before_neighbors_could_be_drawn_and_turned(
    training_set: Root, autoencoder_folder: str
) -> None:
    # Stored when a context was all k neighbors as they are, and images were scaled whole before the cut.
    assert digest(loader(make_recipe(autoencoder_folder), training_set), 12) == "1cd0f0b25de871f1"
    write_tars(training_set)
    assert (
        digest(loader(make_recipe(autoencoder_folder, source="images"), training_set), 12)
        == "9acce8385d0ad554"
    )


def test_some_neighbors_are_drawn_anew_at_each_step_and_nothing_else_changes(
    training_set: Root, autoencoder_folder: str
) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.0)
    all_of_them = loader(recipe, training_set)
    some = loader(make_recipe(autoencoder_folder, p_uncond=0.0, neighbors_used=2), training_set)
    pairs = Counter()
    for step in range(40):
        whole, part = all_of_them.batch(step), some.batch(step)
        assert part.context.shape == (8, 2, 32)
        assert torch.equal(part.noise, whole.noise)
        assert torch.equal(part.timesteps, whole.timesteps)
        for tokens, among in zip(part.context, whole.context, strict=True):
            places = [(among == token).all(dim=1).nonzero().item() for token in tokens]
            pairs[tuple(places)] += 1
    # 4 neighbors have 6 ordered pairs, 53 of each expected of 320
    assert len(pairs) == 6
    assert all(one < other for one, other in pairs)
    assert 25 < min(pairs.values()) <= max(pairs.values()) < 90


def test_noise_turns_every_neighbor_by_the_stated_angle_and_leaves_it_a_unit_vector(
    training_set: Root, autoencoder_folder: str
) -> None:
    changes = {"p_uncond": 0.3, "neighbors_used": 3}
    plain = loader(make_recipe(autoencoder_folder, **changes), training_set)
    noisy = loader(make_recipe(autoencoder_folder, neighbor_noise=0.5, **changes), training_set)
    cosines = []
    for step in range(20):
        one, other = plain.batch(step), noisy.batch(step)
        kept = (one.context != 0).flatten(1).any(dim=1)
        assert torch.equal(kept, (other.context != 0).flatten(1).any(dim=1))
        lengths = other.context[kept].float().norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=2e-3, rtol=0)
        rows = one.context[kept].float()
        cosines += (
            torch.nn.functional.cosine_similarity(rows, other.context[kept].float(), dim=-1)
            .flatten()
            .tolist()
        )
    # this set's rows have length sqrt(32), and noise of 0.5 an entry has half of it
    assert np.mean(cosines) == pytest.approx(1 / np.sqrt(1 + 0.5**2), abs=0.01)


@pytest.mark.parametrize("world", [2, 3])
def test_drawn_neighbors_do_not_depend_on_the_number_of_ranks(
    training_set: Root, autoencoder_folder: str, world: int
) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12, lanes=6, neighbors_used=3, neighbor_noise=0.1)
    alone = loader(recipe, training_set)
    for step in (0, 5):
        whole = dict(zip(rank_slots(alone.order, step, 12, 0, 1).tolist(), alone.batch(step).context))
        for rank in range(world):
            part = loader(recipe, training_set, rank, world)
            slots = rank_slots(part.order, step, 12, rank, world).tolist()
            for slot, context in zip(slots, part.batch(step).context, strict=True):
                assert torch.equal(context, whole[slot])


def test_more_neighbors_than_there_are_cannot_be_used(autoencoder_folder: str) -> None:
    with pytest.raises(ValidationError, match="neighbors_used must be at most k 4, got 5"):
        make_recipe(autoencoder_folder, neighbors_used=5)


def test_split_keeps_order_and_content(training_set: Root, autoencoder_folder: str) -> None:
    batch = loader(make_recipe(autoencoder_folder), training_set).batch(0)
    pieces = list(batch.split(3))
    assert [len(piece.image_ids) for piece in pieces] == [3, 3, 2]
    assert torch.equal(torch.cat([piece.noise for piece in pieces]), batch.noise)


def test_a_latents_table_without_an_image_of_the_neighbors_is_refused(
    training_set: Root, autoencoder_folder: str
) -> None:
    moments = np.zeros((len(ids_of(0)), VIEWS, 2, *SHAPE), np.float16)
    write_latents(training_set, NAMES[0], ids_of(0) + 500, moments)
    with pytest.raises(UserError, match=r"lacks 30 images of the neighbors table.*make latents"):
        list(loader(make_recipe(autoencoder_folder), training_set).batches(0, 9))


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("train", {"k": 8}, r"has k 4, but the recipe wants 8"),
        ("model", {"context_dim": 64}, r"has dim 32, but the recipe wants 64"),
        ("train", {"global_batch": 80}, r"72 rows, fewer than one global batch of 80"),
        ("train", {"size": 128}, r"latents/128/manifest.json is missing"),
        ("model", {"latent_channels": 8}, r"shape \(4, 8, 8\), but the recipe's model takes 8 channels"),
    ],
)
def test_data_that_do_not_fit_the_recipe_are_refused(
    training_set: Root, autoencoder_folder: str, section: str, change: dict[str, int], word: str
) -> None:
    recipe = make_recipe(autoencoder_folder)
    changed = getattr(recipe, section).model_copy(update=change)
    with pytest.raises(UserError, match=word):
        loader(recipe.model_copy(update={section: changed}), training_set)


def test_latents_of_another_autoencoder_or_too_few_are_refused(
    training_set: Root, autoencoder_folder: str
) -> None:
    values = {"autoencoder": "another", "shape": list(SHAPE), "views": VIEWS}
    write_stage(training_set, "latents/64", dict.fromkeys(NAMES, 100), values)
    with pytest.raises(UserError, match="holds latents of autoencoder another"):
        loader(make_recipe(autoencoder_folder), training_set)
    values["autoencoder"] = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu").identity
    write_stage(training_set, "latents/64", dict.fromkeys(NAMES, 20), values)
    with pytest.raises(
        UserError, match=r"20 rows for shard 00000-00004 and neighbors has 30.*do not line up"
    ):
        loader(make_recipe(autoencoder_folder), training_set)


def write_tars(root: Root) -> None:
    """A tar for each shard: gradients, 96 x 80 pixels, whose color tells the image."""
    for number, name in enumerate(NAMES):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for row, image_id in enumerate(ids_of(number).tolist()):
                pixels = np.zeros((80, 96, 3), np.uint8)
                pixels[..., 0] = np.arange(96) * 2
                pixels[..., 1] = 40 * number + row
                encoded = io.BytesIO()
                Image.fromarray(pixels).save(encoded, "PNG")
                info = tarfile.TarInfo(f"{image_id & (2**64 - 1):016x}.jpg")
                info.size = encoded.tell()
                encoded.seek(0)
                tar.addfile(info, encoded)
        root.write_bytes(f"download/train/{name}.tar", buffer.getvalue())
    write_stage(root, "download", {}, {})


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("model", {"latent_channels": 8}, "model takes 8 channels"),
        ("train", {"size": 60}, "60 px is no multiple of the autoencoder's factor 8"),
    ],
)
def test_images_that_do_not_fit_the_autoencoder_or_the_model_are_refused(
    training_set: Root, autoencoder_folder: str, section: str, change: dict[str, int], word: str
) -> None:
    write_stage(training_set, "download", {}, {})
    recipe = make_recipe(autoencoder_folder, source="images")
    changed = getattr(recipe, section).model_copy(update=change)
    with pytest.raises(UserError, match=word):
        loader(recipe.model_copy(update={section: changed}), training_set)


def test_images_are_cut_anew_each_epoch_and_alike_for_any_number_of_ranks(
    training_set: Root, autoencoder_folder: str
) -> None:
    write_tars(training_set)
    recipe = make_recipe(autoencoder_folder, source="images", global_batch=12)
    alone = loader(recipe, training_set)
    batches = [alone.batch(step) for step in range(12)]
    assert batches[0].inputs.shape == (12, 3, 64, 64)
    cuts: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for image_id, pixels in zip(batch.image_ids.tolist(), batch.inputs, strict=True):
            shard, row = divmod(image_id + (1 << 62), 1000)
            assert pixels[1].mean().item() == pytest.approx((40 * shard + row) / 127.5 - 1, abs=0.01)
            cuts.setdefault(image_id, []).append(pixels)
    differing = [not torch.equal(*pair) for pair in cuts.values()]
    assert np.mean(differing) > 0.8
    second = loader(recipe, training_set, rank=1, world=2).batch(3)
    slots = rank_slots(alone.order, 3, 12, 1, 2).tolist()
    order = rank_slots(alone.order, 3, 12, 0, 1).tolist()
    assert torch.equal(second.inputs, batches[3].inputs[[order.index(slot) for slot in slots]])
