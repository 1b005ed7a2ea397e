"""The distribution of the timesteps that training draws. Reads and writes nothing."""

import numpy as np
import numpy.typing as npt
import torch

from trainer.recipe import TrainConfig


def timestep_distribution(config: TrainConfig, steps: int) -> npt.NDArray[np.float64] | None:
    """Probability of a timestep of at most t, for each t of `steps`: (steps,) float64. None: uniform.

    Timestep t stands for the range t / steps to (t + 1) / steps. Its probability is that of the range.
    """
    edges = np.arange(1, steps + 1) / steps
    if config.timestep_sampling == "uniform":
        return None
    if config.timestep_sampling == "logit_normal":
        # Esser et al. 2024, section 3.1: the logit of t / T is normally distributed.
        logits = torch.logit(torch.from_numpy(edges))
        values = (logits - config.timestep_logit_mean) / config.timestep_logit_deviation
        return np.asarray(torch.special.ndtr(values))
    sums = np.concatenate([[0.0], np.cumsum(config.timestep_density)])
    return np.interp(edges, np.linspace(0, 1, len(sums)), sums / sums[-1])


def draw_timestep(rng: np.random.Generator, steps: int, distribution: npt.NDArray[np.float64] | None) -> int:
    """A timestep in 0 .. steps - 1. distribution: of `timestep_distribution`."""
    if distribution is None:
        return int(rng.integers(steps))
    return int(np.searchsorted(distribution, rng.random(), side="right"))
