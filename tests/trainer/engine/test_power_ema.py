"""Power-function averages: their profiles, and averages of other widths from stored ones."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrieval.errors import UserError
from trainer.engine.fragments import Fragment
from trainer.engine.power_ema import PowerAverage, Profile, combine, exponent_of

UPDATES, EVERY = 2000, 100


def averages_of(weights: torch.Tensor, width: float) -> npt.NDArray[np.float64]:
    """The average after each update, (updates, n). weights: (updates, n)."""
    master = torch.zeros(weights.shape[1], dtype=torch.float64)
    average = PowerAverage([Fragment("w", 0, master)], width)
    values = []
    for update, row in enumerate(weights, start=1):
        master.copy_(row)
        average.update(torch.tensor(float(update), dtype=torch.float64), torch.tensor(True))
        values.append(average.fragments[0].values.numpy().copy())
    return np.stack(values)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_shares_of_the_updates_have_the_width_and_the_power_of_the_profile(width: float) -> None:
    shares = averages_of(torch.eye(1000, dtype=torch.float64), width)[-1]
    updates = np.arange(1, 1001)
    assert shares.sum() == pytest.approx(1)
    mean = shares @ updates
    assert np.sqrt(shares @ (updates - mean) ** 2) / 1000 == pytest.approx(width, rel=0.01)
    ends = (updates / 1000) ** (exponent_of(width) + 1)
    np.testing.assert_allclose(shares, np.diff(ends, prepend=0), atol=1e-12)


def test_the_exponents_are_those_of_the_paper() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15, 0.2])
def test_snapshots_give_the_average_that_was_tracked_with_another_width(width: float) -> None:
    steps = np.random.default_rng(1).standard_normal((UPDATES, 50))
    weights = torch.from_numpy(np.cumsum(steps, axis=0))
    times = range(EVERY, UPDATES + 1, EVERY)
    stored = {each: averages_of(weights, each) for each in (0.05, 0.1)}
    profiles = [Profile(each, time) for each in stored for time in times]
    rows = np.stack([stored[each][time - 1].astype(np.float16) for each in stored for time in times])
    factors, error = combine(profiles, Profile(width, UPDATES))
    tracked = averages_of(weights, width)[-1]
    difference = np.linalg.norm(factors @ rows.astype(np.float64) - tracked) / np.linalg.norm(tracked)
    nearest = min(np.linalg.norm(values[-1] - tracked) for values in stored.values()) / np.linalg.norm(tracked)
    assert error < 0.05
    assert difference < 0.1 * nearest


def test_a_width_that_the_snapshots_do_not_give_is_refused() -> None:
    profiles = [Profile(width, time) for width in (0.05, 0.1) for time in (1000, 2000)]
    with pytest.raises(UserError, match=r"4 stored averages of widths 0\.05, 0\.1 give an average of width 0\.01 only"):
        combine(profiles, Profile(0.01, 2000))
