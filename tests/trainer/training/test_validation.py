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
from tests.trainer.training_set import ROWS, K, all_ids, make_recipe, plan_of
from trainer.data.loader import Loader
from trainer.data.plan import last_rows
from trainer.engine.deepspeed_engine import Ranks, join_ranks
from trainer.model.autoencoder import Autoencoder
from trainer.training.validation import ValidationSet, held_out_rows, read_held_out


def test_the_last_rows_of_the_last_shards_are_held_out() -> None:
    assert last_rows([30, 17, 25], 0) == (0, 0, 0)
    assert last_rows([30, 17, 25], 25) == (0, 0, 25)
    assert last_rows([30, 17, 25], 44) == (2, 17, 25)


@pytest.mark.parametrize("held_out", [5, 25, 32])
def test_training_uses_exactly_the_images_that_are_not_held_out(
    training_set: Root, autoencoder_folder: str, held_out: int
) -> None:
    plan = plan_of(autoencoder_folder, training_set, validation_images=held_out)
    loader = Loader(plan, training_set, 0, 1)
    training_ids = all_ids()[: sum(ROWS) - held_out]
    batches = [loader.batch(step).image_ids.tolist() for step in range(2 * len(training_ids) // 8)]
    counts = Counter(image for batch in batches for image in batch)
    assert set(counts) == set(training_ids)
    assert max(counts.values()) == 2
    images = read_held_out(plan, loader, held_out_rows(plan.training_set), None)
    assert images.image_ids.tolist() == all_ids()[sum(ROWS) - held_out :]
    # Moments are those of view 0 of the same image: the training set's mean latents depend on the neighbors.
    expected = 5 * images.context.float().mean(dim=(1, 2))
    mean, deviation = images.moments.float().chunk(2, dim=1)
    torch.testing.assert_close(mean.mean(dim=(1, 2, 3)), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.1), atol=1e-3, rtol=0)


def test_held_out_images_are_encoded_as_in_training(training_set: Root, autoencoder_folder: str) -> None:
    write_tars(training_set)
    plan = plan_of(autoencoder_folder, training_set, source="images", validation_images=5)
    autoencoder = Autoencoder.load(plan.config.autoencoder, "cpu")
    loader, rows = Loader(plan, training_set, 0, 1), held_out_rows(plan.training_set)
    held_out = read_held_out(plan, loader, rows, autoencoder)
    pixels = np.stack([loader.shard(number).inputs(row, 0) for number, row in rows])
    expected = autoencoder.encode_moments(torch.from_numpy(pixels))
    assert held_out.moments.shape == (5, 8, 8, 8)
    torch.testing.assert_close(held_out.moments.float(), expected, rtol=1e-2, atol=1e-2)


def test_held_out_contexts_have_as_many_neighbors_as_training_contexts(
    training_set: Root, autoencoder_folder: str
) -> None:
    def context(neighbors_used: int) -> torch.Tensor:
        changes = {"validation_images": 5, "neighbors_used": neighbors_used}
        plan = plan_of(autoencoder_folder, training_set, **changes)
        loader = Loader(plan, training_set, 0, 1)
        return read_held_out(plan, loader, held_out_rows(plan.training_set), None).context

    assert context(0).shape[1] == K
    assert torch.equal(context(2), context(0)[:, :2])


def test_too_many_held_out_images_for_one_batch_are_an_error(training_set: Root, autoencoder_folder: str) -> None:
    with pytest.raises(
        UserError, match=r"72 rows, 65 of them held out: fewer training rows than one global batch of 8"
    ):
        plan_of(autoencoder_folder, training_set, validation_images=65)


@pytest.mark.parametrize("setting", ["validate_every", "preview_every", "kid_every"])
def test_validation_and_samples_need_held_out_images(setting: str) -> None:
    least = 2 if setting == "kid_every" else 1
    with pytest.raises(ValidationError, match=f"need validation_images of at least {least}"):
        make_recipe("", **{setting: 10})


class Zero(torch.nn.Module):
    """Predicts 0, so that the loss is the mean square of the noise; records the timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        assert (context != 0).any(dim=2).all()
        self.timesteps += t.tolist()
        return (torch.zeros_like(x_t),)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group with one rank."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield join_ranks()
    dist.destroy_process_group()


def test_noise_and_timesteps_are_fixed_and_cover_all_quartiles(
    training_set: Root, autoencoder_folder: str, one_rank: Ranks
) -> None:
    plan = plan_of(autoencoder_folder, training_set, validation_images=10, validate_every=1)
    loader, unet = Loader(plan, training_set, 0, 1), Zero()
    loss, quartiles = ValidationSet(plan, loader, None, one_rank).loss(unet, torch.float32)
    assert [t // 250 for t in unet.timesteps] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    # The mean square of standard normal noise, over 10 images and over 2 or 3, of 256 values each.
    assert loss == pytest.approx(1, abs=0.1)
    assert quartiles == pytest.approx([1] * 4, abs=0.2)
    other = plan_of(autoencoder_folder, training_set, validation_images=10, validate_every=1, seed=9)
    repeated = ValidationSet(other, Loader(other, training_set, 0, 1), None, one_rank).loss(unet, torch.float32)
    assert repeated == (loss, quartiles)
    assert unet.timesteps[:10] == unet.timesteps[10:]
