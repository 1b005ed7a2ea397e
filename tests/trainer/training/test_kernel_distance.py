"""The kernel distance of samples from held-out images, on one rank in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import deepspeed.comm as dist
import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.common.processes import set_single_rank
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.tiny_run import write_clip
from tests.trainer.training_set import plan_of
from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks, join_ranks
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.training.kernel_distance import SampleDistance
from trainer.training.previews import Drawer
from trainer.training.validation import held_out_rows, read_held_out

IMAGES = 10


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    """A process group with one rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
        set_single_rank()
        yield join_ranks()
    dist.destroy_process_group()


def plan_with_clip(folder: Path, root: Root, autoencoder_folder: str) -> tuple[TrainingPlan, Encoder]:
    """A plan with held-out images, and an untrained CLIP as the encoder of its neighbors."""
    plan = plan_of(autoencoder_folder, root, validation_images=IMAGES + 2, kid_images=IMAGES)
    clip = write_clip(folder / "clip")
    encoder = Encoder(clip)
    config = plan.config.model_copy(update={"clip": clip})
    return replace(plan, config=config, encoder=encoder.identity.model_dump()), encoder


def kernel(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (left @ right.T + 1) ** 3


def test_the_distance_is_the_unbiased_one_of_all_samples_and_changes_with_the_weights(
    tmp_path: Path, training_set: Root, autoencoder_folder: str, one_rank: Ranks
) -> None:
    plan, encoder = plan_with_clip(tmp_path, training_set, autoencoder_folder)
    loader = Loader(plan, training_set, 0, 1)
    drawer = Drawer(Autoencoder.load(plan.config.autoencoder, "cpu"), plan.config.diffusion, one_rank.device)
    distance = SampleDistance(plan, loader, drawer, None, one_rank)
    torch.manual_seed(0)
    unet = build_unet(plan.config.model).eval()
    random_state = torch.get_rng_state()
    value = distance.of(unet)
    assert torch.equal(torch.get_rng_state(), random_state)
    images = read_held_out(plan, loader, held_out_rows(plan.training_set)[:IMAGES], None)
    samples = drawer.samples(unet, images.context, range(IMAGES), images.latent_shape)
    x, y = (encoder.encode_images(pictures).astype(float) for pictures in (samples, drawer.originals(images)))
    others = ~np.eye(IMAGES, dtype=bool)
    expected = kernel(x, x)[others].mean() + kernel(y, y)[others].mean() - 2 * kernel(x, y).mean()
    assert value == pytest.approx(expected, rel=1e-3)
    assert distance.of(unet) == value
    torch.manual_seed(1)
    assert distance.of(build_unet(plan.config.model).eval()) != value


def test_the_encoder_must_be_that_of_the_neighbors(
    tmp_path: Path, training_set: Root, autoencoder_folder: str, one_rank: Ranks
) -> None:
    plan, encoder = plan_with_clip(tmp_path, training_set, autoencoder_folder)
    other = replace(plan, encoder=encoder.identity.model_dump() | {"weights": "0" * 16})
    drawer = Drawer(Autoencoder.load(plan.config.autoencoder, "cpu"), plan.config.diffusion, one_rank.device)
    with pytest.raises(UserError, match=r"train\.preview_prompts to \[\] and train\.kid_every to 0"):
        SampleDistance(other, Loader(plan, training_set, 0, 1), drawer, None, one_rank)
