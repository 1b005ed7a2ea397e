"""The distribution of timesteps compared with formulas and with drawn numbers."""

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe, plan_of
from trainer.data.loader import Loader
from trainer.data.timesteps import draw_timestep, timestep_distribution


def draws(count: int = 20_000, steps: int = 1000, **changes: object) -> npt.NDArray[np.int64]:
    distribution = timestep_distribution(make_recipe("", **changes).train, steps)
    rng = np.random.default_rng(1)
    return np.array([draw_timestep(rng, steps, distribution) for _ in range(count)])


def test_uniform_timesteps_are_the_draws_of_numpy() -> None:
    rng = np.random.default_rng(1)
    assert draws(100).tolist() == [int(rng.integers(1000)) for _ in range(100)]


def test_logits_of_timesteps_are_normally_distributed() -> None:
    changes = {"timestep_sampling": "logit_normal", "timestep_logit_mean": 0.5, "timestep_logit_deviation": 0.8}
    centers = (draws(**changes) + 0.5) / 1000
    logits = np.log(centers / (1 - centers))
    assert logits.mean() == pytest.approx(0.5, abs=0.02)
    assert logits.std() == pytest.approx(0.8, abs=0.02)
    distribution = timestep_distribution(make_recipe("", **changes).train, 1000)
    assert distribution is not None
    expected = NormalDist(0.5, 0.8).cdf(math.log(0.25 / 0.75))
    assert distribution[249] == pytest.approx(expected)
    assert distribution[-1] == 1


def test_a_stated_density_gives_its_share_to_each_range() -> None:
    timesteps = draws(timestep_sampling="density", timestep_density=[1, 0, 2, 1])
    shares = np.bincount(timesteps // 250, minlength=4) / len(timesteps)
    np.testing.assert_allclose(shares, [0.25, 0, 0.5, 0.25], atol=0.01)
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    # 10 timesteps in 4 ranges: timestep 2 lies half in the first range.
    distribution = timestep_distribution(
        make_recipe("", timestep_sampling="density", timestep_density=[1, 0, 2, 1]).train, 10
    )
    np.testing.assert_allclose(distribution, [0.1, 0.2, 0.25, 0.25, 0.25, 0.45, 0.65, 0.8, 0.9, 1])


def test_batches_have_timesteps_of_the_density_and_the_same_rows(training_set: Root, autoencoder_folder: str) -> None:
    changes = {"timestep_sampling": "density", "timestep_density": [0, 0, 1, 0]}
    plans = [plan_of(autoencoder_folder, training_set, **settings) for settings in ({}, changes)]
    uniform, dense = ([Loader(plan, training_set, 0, 1).batch(step) for step in (0, 1)] for plan in plans)
    timesteps = np.concatenate([batch.timesteps.numpy() for batch in dense])
    assert (timesteps.min() >= 500) & (timesteps.max() < 750)
    assert max(batch.timesteps.max() for batch in uniform) >= 750
    assert [batch.image_ids.tolist() for batch in dense] == [batch.image_ids.tolist() for batch in uniform]
