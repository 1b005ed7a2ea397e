from collections import Counter
from collections.abc import Iterator

import deepspeed.comm as dist
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.data.test_loader import write_tars
from tests.trainer.training_set import ROWS, K, all_ids, make_recipe
from trainer.data.loader import Loader
from trainer.data.plan import Plan, last_rows, make_plan
from trainer.engine.deepspeed_engine import Ranks, join_ranks
from trainer.model.autoencoder import Autoencoder
from trainer.training.validation import ValidationSet, held_out_rows, read_held_out


def plan_of(autoencoder_folder: str, root: Root, **changes: object) -> Plan:
    recipe = make_recipe(autoencoder_folder, **changes)
    return make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))


def test_the_last_rows_of_the_last_shards_are_held_out() -> None:
    assert last_rows([30, 17, 25], 0) == (0, 0, 0)
    assert last_rows([30, 17, 25], 25) == (0, 0, 25)
    assert last_rows([30, 17, 25], 44) == (2, 17, 25)


@pytest.mark.parametrize("held_out", [5, 25, 32])
def test_training_sees_every_image_that_is_not_held_out_and_no_other(
    training_set: Root, autoencoder_folder: str, held_out: int
) -> None:
    plan = plan_of(autoencoder_folder, training_set, validation_images=held_out)
    loader = Loader(plan, training_set, 0, 1)
    kept = all_ids()[: sum(ROWS) - held_out]
    batches = [loader.batch(step).image_ids.tolist() for step in range(2 * len(kept) // 8)]
    seen = Counter(image for batch in batches for image in batch)
    assert set(seen) == set(kept)
    assert max(seen.values()) == 2
    images = read_held_out(plan, loader, held_out_rows(plan.samples), None)
    assert images.image_ids.tolist() == all_ids()[sum(ROWS) - held_out :]
    # Moments are those of view 0 of the very image: the mean tells of its neighbors.
    told = 5 * images.context.float().mean(dim=(1, 2))
    mean, deviation = images.moments.float().chunk(2, dim=1)
    torch.testing.assert_close(mean.mean(dim=(1, 2, 3)), told, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.1), atol=1e-3, rtol=0)


def test_held_out_images_are_encoded_once_as_training_encodes_them(
    training_set: Root, autoencoder_folder: str
) -> None:
    write_tars(training_set)
    plan = plan_of(autoencoder_folder, training_set, source="images", validation_images=5)
    autoencoder = Autoencoder.load(plan.config.autoencoder, "cpu")
    loader, rows = Loader(plan, training_set, 0, 1), held_out_rows(plan.samples)
    held_out = read_held_out(plan, loader, rows, autoencoder)
    pixels = np.stack([loader.shard(number).inputs(row, 0) for number, row in rows])
    wanted = autoencoder.encode_moments(torch.from_numpy(pixels))
    assert held_out.moments.shape == (5, 8, 8, 8)
    torch.testing.assert_close(held_out.moments.float(), wanted, rtol=1e-2, atol=1e-2)


def test_a_context_holds_as_many_of_the_best_neighbors_as_training_takes(
    training_set: Root, autoencoder_folder: str
) -> None:
    wide, narrow = (
        plan_of(autoencoder_folder, training_set, validation_images=5, neighbors_used=used) for used in (0, 2)
    )
    rows = held_out_rows(wide.samples)
    whole, some = (
        read_held_out(plan, Loader(plan, training_set, 0, 1), rows, None).context for plan in (wide, narrow)
    )
    assert whole.shape[1] == K
    assert torch.equal(some, whole[:, :2])


def test_holding_out_so_much_that_no_batch_is_left_is_refused(
    training_set: Root, autoencoder_folder: str
) -> None:
    with pytest.raises(UserError, match=r"72 rows less 65 held out, fewer than one global batch of 8"):
        plan_of(autoencoder_folder, training_set, validation_images=65)


@pytest.mark.parametrize("setting", ["validate_every", "preview_every"])
def test_looking_at_held_out_images_without_any_is_refused(setting: str) -> None:
    with pytest.raises(ValidationError, match="need validation_images of at least 1"):
        make_recipe("", **{setting: 10})


class Zero(torch.nn.Module):
    """Predicts nothing, so that the loss is what was drawn; keeps the timesteps it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        assert (context != 0).any(dim=2).all()
        self.asked += t.tolist()
        return (torch.zeros_like(x_t),)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of this process alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield join_ranks()
    dist.destroy_process_group()


def test_draws_are_fixed_and_every_quartile_has_its_share(
    training_set: Root, autoencoder_folder: str, one_rank: Ranks
) -> None:
    plan = plan_of(autoencoder_folder, training_set, validation_images=10, validate_every=1)
    loader, unet = Loader(plan, training_set, 0, 1), Zero()
    loss, quartiles = ValidationSet(plan, loader, None, one_rank).loss(unet, torch.float32)
    assert [t // 250 for t in unet.asked] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    # The mean square of standard normal noise, of 10 and of 2 or 3 images of 256 numbers.
    assert loss == pytest.approx(1, abs=0.1)
    assert quartiles == pytest.approx([1] * 4, abs=0.2)
    other = plan_of(autoencoder_folder, training_set, validation_images=10, validate_every=1, seed=9)
    again = ValidationSet(other, Loader(other, training_set, 0, 1), None, one_rank).loss(unet, torch.float32)
    assert again == (loss, quartiles)
    assert unet.asked[:10] == unet.asked[10:]
