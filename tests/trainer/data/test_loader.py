import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import (
    DIM,
    NAMES,
    ROWS,
    SHAPE,
    VIEWS,
    K,
    all_ids,
    ids_of,
    make_recipe,
    new_training_set,
    plan_of,
    write_latents,
    write_neighbors,
    write_stage,
    write_tars,
)
from trainer.data.loader import Loader, TrainingBatch
from trainer.data.plan import make_plan
from trainer.data.sample_order import rank_slots
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import TrainingRecipe


def loader(recipe: TrainingRecipe, root: Root, rank: int = 0, world: int = 1) -> Loader:
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    return Loader(make_plan(recipe, root, autoencoder), root, rank, world)


def global_batch(recipe: TrainingRecipe, root: Root, step: int, world: int) -> list[tuple[object, ...]]:
    """The samples of a global batch by slot, loaded by `world` ranks."""
    count = recipe.train.global_batch
    samples: dict[int, tuple[object, ...]] = {}
    for rank in range(world):
        rank_loader = loader(recipe, root, rank, world)
        batch = rank_loader.batch(step)
        slots = rank_slots(rank_loader.order.orders[0], step * count, count, rank, world).tolist()
        noises = batch.noise.sum(dim=(1, 2, 3)).tolist()
        samples.update(zip(slots, zip(batch.image_ids.tolist(), batch.timesteps.tolist(), noises), strict=True))
    return [samples[slot] for slot in range(count)]


def assert_equal(first: TrainingBatch, second: TrainingBatch) -> None:
    assert first.image_ids.tolist() == second.image_ids.tolist()
    for name in ("inputs", "context", "timesteps", "posterior_noise", "noise"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_loads_every_sample_once_per_epoch(
    training_set: Root, autoencoder_folder: str, world: int
) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12, interleaved_shards=6)
    loaders = [loader(recipe, training_set, rank, world) for rank in range(world)]
    # 72 samples are 6 batches of 12.
    for epoch in range(2):
        shares = [rank.batch(6 * epoch + step).image_ids.tolist() for step in range(6) for rank in loaders]
        assert Counter(image for share in shares for image in share) == Counter(all_ids())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("lanes", [6, 5])
def test_order_and_noise_do_not_depend_on_the_number_of_ranks(
    training_set: Root, autoencoder_folder: str, world: int, lanes: int
) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12, interleaved_shards=lanes)
    for step in (0, 3, 7):
        assert global_batch(recipe, training_set, step, world) == global_batch(recipe, training_set, step, 1)


def test_a_loader_resumes_at_any_step_with_any_number_of_threads(training_set: Root, autoencoder_folder: str) -> None:
    whole = list(loader(make_recipe(autoencoder_folder), training_set).batches(0, 12))
    threads = make_recipe(autoencoder_folder, workers=5, prefetch_batches=9)
    resumed = list(loader(threads, training_set).batches(7, 12))
    assert len(resumed) == 5
    for batch, resumed_batch in zip(whole[7:], resumed, strict=True):
        assert_equal(batch, resumed_batch)


def test_batches_are_pinned_where_cuda_is_in_use(
    training_set: Root, autoencoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loader(make_recipe(autoencoder_folder), training_set)
    expected, pinned = batches.batch(3), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    batch = batches.batch(3)
    assert_equal(batch, expected)
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    assert all(any(tensor is one for one in pinned) for tensor in tensors)


def test_rows_are_joined_by_id_and_each_epoch_uses_the_next_view(training_set: Root, autoencoder_folder: str) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.0)
    batches = loader(recipe, training_set)
    for step in (0, 9, 18):
        batch = batches.batch(step)
        mean, deviation = batch.inputs.float().chunk(2, dim=1)
        expected = 5 * batch.context.float().mean(dim=(1, 2))
        torch.testing.assert_close(mean.mean(dim=(1, 2, 3)), expected, atol=1e-2, rtol=1e-2)
        # 72 samples are 9 batches of 8.
        view = (step // 9) % VIEWS
        torch.testing.assert_close(deviation, torch.full_like(deviation, 0.1 * (view + 1)), atol=1e-3, rtol=0)


def test_samples_lose_all_neighbors_together_with_probability_p_uncond(
    training_set: Root, autoencoder_folder: str
) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.3)
    batches = [loader(recipe, training_set).batch(step) for step in range(60)]
    empty = torch.cat([(batch.context == 0).flatten(1).float().mean(dim=1) for batch in batches])
    assert set(empty.round().tolist()) == {0.0, 1.0}
    assert ((empty > 0.9) | (empty < 0.1)).all()
    assert empty.round().mean().item() == pytest.approx(0.3, abs=0.06)


def digest(loader: Loader, steps: int) -> str:
    """16 hex digits of a hash over all values in the batches of the first steps."""
    sha256 = hashlib.sha256()
    for step in range(steps):
        batch = loader.batch(step)
        sha256.update(batch.image_ids.tobytes())
        for name in ("inputs", "context", "timesteps", "posterior_noise", "noise"):
            sha256.update(getattr(batch, name).numpy().tobytes())
    return sha256.hexdigest()[:16]


def test_batches_equal_the_stored_digests(training_set: Root, autoencoder_folder: str) -> None:
    # Stored before `neighbors_used` and `neighbor_noise` existed, when images were scaled before cropping.
    assert digest(loader(make_recipe(autoencoder_folder), training_set), 12) == "1cd0f0b25de871f1"
    write_tars(training_set)
    assert digest(loader(make_recipe(autoencoder_folder, source="images"), training_set), 12) == "9acce8385d0ad554"


def test_neighbors_used_draws_neighbors_at_each_step_and_changes_nothing_else(
    training_set: Root, autoencoder_folder: str
) -> None:
    recipe = make_recipe(autoencoder_folder, p_uncond=0.0)
    full = loader(recipe, training_set)
    drawn = loader(make_recipe(autoencoder_folder, p_uncond=0.0, neighbors_used=2), training_set)
    pairs = Counter()
    for step in range(40):
        whole, part = full.batch(step), drawn.batch(step)
        assert part.context.shape == (8, 2, 32)
        assert torch.equal(part.noise, whole.noise)
        assert torch.equal(part.timesteps, whole.timesteps)
        for tokens, neighbors in zip(part.context, whole.context, strict=True):
            indices = [(neighbors == token).all(dim=1).nonzero().item() for token in tokens]
            pairs[tuple(indices)] += 1
    # 4 neighbors have 6 pairs in rank order; of 320 draws, 53 of each are expected.
    assert len(pairs) == 6
    assert all(first < second for first, second in pairs)
    assert 25 < min(pairs.values()) <= max(pairs.values()) < 90


def test_neighbor_noise_rotates_unit_vectors_by_the_expected_angle(training_set: Root, autoencoder_folder: str) -> None:
    changes = {"p_uncond": 0.3, "neighbors_used": 3}
    plain = loader(make_recipe(autoencoder_folder, **changes), training_set)
    noisy = loader(make_recipe(autoencoder_folder, neighbor_noise=0.5, **changes), training_set)
    cosines = []
    for step in range(20):
        before, after = plain.batch(step).context, noisy.batch(step).context
        has_context = (before != 0).flatten(1).any(dim=1)
        assert torch.equal(has_context, (after != 0).flatten(1).any(dim=1))
        before, after = before[has_context].float(), after[has_context].float()
        lengths = after.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=2e-3, rtol=0)
        cosines += torch.nn.functional.cosine_similarity(before, after, dim=-1).flatten().tolist()
    # Rows of this training set have length sqrt(32); noise of deviation 0.5 has half of that.
    assert np.mean(cosines) == pytest.approx(1 / np.sqrt(1 + 0.5**2), abs=0.01)


def test_a_model_of_raw_vectors_gets_the_lengths_of_its_neighbors(tmp_path: Path, autoencoder_folder: str) -> None:
    root = new_training_set(tmp_path, autoencoder_folder)
    context = np.random.default_rng(1).standard_normal((ROWS[0], K, DIM)).astype(np.float16)
    norms = np.linspace(5, 15, ROWS[0] * K, dtype=np.float32).reshape(ROWS[0], K)
    units = (context / np.linalg.norm(context, axis=-1, keepdims=True)).astype(np.float16)
    write_neighbors(root, NAMES[0], ids_of(0), units, norms)
    unit, raw, noisy = (
        loader(with_norm(make_recipe(autoencoder_folder, neighbor_noise=noise), norm), root, 0, 1)
        for norm, noise in (("unit", 0.0), ("raw", 0.0), ("raw", 0.05))
    )
    np.testing.assert_array_equal(unit.shard(0).context, units)
    np.testing.assert_allclose(np.linalg.norm(raw.shard(0).context.astype(np.float32), axis=-1), norms, rtol=2e-3)
    row = raw.shard(0).context[7]
    noised = noisy._context(row, 0, 0).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(noised, axis=-1), norms[7], rtol=2e-3)
    cosines = (noised * row).sum(axis=1) / norms[7] ** 2
    assert 0.9 < cosines.min() < cosines.max() < 0.99

    norms[3, 2] = np.nan
    write_neighbors(root, NAMES[0], ids_of(0), units, norms)
    assert len(loader(make_recipe(autoencoder_folder), root, 0, 1).shard(0).ids) == ROWS[0]
    with pytest.raises(UserError, match=f"{NAMES[0]}.parquet lacks the lengths of 1 of 120 vectors"):
        loader(with_norm(make_recipe(autoencoder_folder), "raw"), root, 0, 1).shard(0)


def with_norm(recipe: TrainingRecipe, norm: str) -> TrainingRecipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"context_norm": norm})})


@pytest.mark.parametrize("world", [2, 3])
def test_drawn_neighbors_do_not_depend_on_the_number_of_ranks(
    training_set: Root, autoencoder_folder: str, world: int
) -> None:
    recipe = make_recipe(
        autoencoder_folder, global_batch=12, interleaved_shards=6, neighbors_used=3, neighbor_noise=0.1
    )
    single = loader(recipe, training_set)
    for step in (0, 5):
        slots = rank_slots(single.order.orders[0], step * 12, 12, 0, 1).tolist()
        contexts = dict(zip(slots, single.batch(step).context, strict=True))
        for rank in range(world):
            rank_loader = loader(recipe, training_set, rank, world)
            slots = rank_slots(rank_loader.order.orders[0], step * 12, 12, rank, world).tolist()
            for slot, context in zip(slots, rank_loader.batch(step).context, strict=True):
                assert torch.equal(context, contexts[slot])


def test_neighbors_used_cannot_exceed_k(autoencoder_folder: str) -> None:
    with pytest.raises(ValidationError, match="neighbors_used must be at most k 4, got 5"):
        make_recipe(autoencoder_folder, neighbors_used=5)


def test_splitting_a_batch_keeps_order_and_content(training_set: Root, autoencoder_folder: str) -> None:
    batch = loader(make_recipe(autoencoder_folder), training_set).batch(0)
    parts = list(batch.split(3))
    assert [len(part.image_ids) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.noise for part in parts]), batch.noise)


def test_a_latents_table_that_lacks_images_of_the_neighbors_table_is_an_error(
    training_set: Root, autoencoder_folder: str
) -> None:
    moments = np.zeros((len(ids_of(0)), VIEWS, 2, *SHAPE), np.float16)
    write_latents(training_set, NAMES[0], ids_of(0) + 500, moments)
    with pytest.raises(UserError, match=r"lacks 30 images of the neighbors table.*make latents"):
        list(loader(make_recipe(autoencoder_folder), training_set).batches(0, 9))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"k": 8}, r"has k 4, but the recipe has 8"),
        ("model", {"context_dim": 64}, r"has dim 32, but the recipe has 64"),
        ("train", {"global_batch": 80}, r"72 rows: fewer training rows than one global batch of 80"),
        ("train", {"size": 128}, r"latents/128/manifest.json is missing"),
        ("model", {"latent_channels": 8}, r"shape \(4, 8, 8\), but the recipe's model takes 8 channels"),
    ],
)
def test_data_that_do_not_match_the_recipe_are_an_error(
    training_set: Root, autoencoder_folder: str, section: str, change: dict[str, int], message: str
) -> None:
    recipe = make_recipe(autoencoder_folder)
    changed = getattr(recipe, section).model_copy(update=change)
    with pytest.raises(UserError, match=message):
        loader(recipe.model_copy(update={section: changed}), training_set)


def test_latents_of_another_autoencoder_or_too_few_rows_are_an_error(
    training_set: Root, autoencoder_folder: str
) -> None:
    values = {"autoencoder": "another", "shape": list(SHAPE), "views": VIEWS}
    write_stage(training_set, "latents/64", dict.fromkeys(NAMES, 100), values)
    with pytest.raises(UserError, match="has latents of autoencoder another"):
        loader(make_recipe(autoencoder_folder), training_set)
    values["autoencoder"] = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu").identity
    write_stage(training_set, "latents/64", dict.fromkeys(NAMES, 20), values)
    with pytest.raises(UserError, match=r"20 rows for shard 00000-00004, but neighbors has 30.*do not match"):
        loader(make_recipe(autoencoder_folder), training_set)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"latent_channels": 8}, "model takes 8 channels"),
        ("train", {"size": 60}, "60 px is no multiple of the autoencoder's factor 8"),
    ],
)
def test_images_that_do_not_match_the_autoencoder_or_the_model_are_an_error(
    training_set: Root, autoencoder_folder: str, section: str, change: dict[str, int], message: str
) -> None:
    write_stage(training_set, "download", {}, {})
    recipe = make_recipe(autoencoder_folder, source="images")
    changed = getattr(recipe, section).model_copy(update=change)
    with pytest.raises(UserError, match=message):
        loader(recipe.model_copy(update={section: changed}), training_set)


def test_random_crops_differ_between_epochs_and_not_between_numbers_of_ranks(
    training_set: Root, autoencoder_folder: str
) -> None:
    write_tars(training_set)
    recipe = make_recipe(autoencoder_folder, source="images", global_batch=12)
    single = loader(recipe, training_set)
    batches = [single.batch(step) for step in range(12)]
    assert batches[0].inputs.shape == (12, 3, 64, 64)
    crops: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for image_id, pixels in zip(batch.image_ids.tolist(), batch.inputs, strict=True):
            shard, row = divmod(image_id + (1 << 62), 1000)
            assert pixels[1].mean().item() == pytest.approx((40 * shard + row) / 127.5 - 1, abs=0.01)
            crops.setdefault(image_id, []).append(pixels)
    differing = [not torch.equal(*pair) for pair in crops.values()]
    assert np.mean(differing) > 0.8
    second = loader(recipe, training_set, rank=1, world=2).batch(3)
    slots = rank_slots(single.order.orders[0], 36, 12, 1, 2).tolist()
    order = rank_slots(single.order.orders[0], 36, 12, 0, 1).tolist()
    assert torch.equal(second.inputs, batches[3].inputs[[order.index(slot) for slot in slots]])


def test_a_changed_batch_goes_on_at_the_next_position(training_set: Root, autoencoder_folder: str) -> None:
    recipe = make_recipe(autoencoder_folder, global_batch=12)
    plan = plan_of(autoencoder_folder, training_set, global_batch=4)
    before = loader(recipe, training_set).batch(3)
    slots = rank_slots(loader(recipe, training_set).order.orders[0], 36, 12, 0, 1).tolist()
    ids = dict(zip(slots, before.image_ids.tolist(), strict=True))
    shifted = Loader(plan, training_set, 0, 1, shift=36 - 3 * 4)
    for part, step in enumerate((3, 4, 5)):
        assert set(shifted.batch(step).image_ids.tolist()) == {ids[4 * part + slot] for slot in range(4)}
