"""Power-function averages of the weights, and averages of other widths from stored ones.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. After
t updates the weights of update tau have the share (gamma + 1) tau^gamma / t^(gamma + 1), the profile. Its width is its
standard deviation divided by t. Reads and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrieval.errors import UserError
from trainer.engine.ema import MovingAverage
from trainer.engine.fragments import Fragment

MAX_ERROR = 0.1
"""Largest error of a combined profile that is accepted, as a share of the norm of the wanted one."""


def exponent_of(width: float) -> float:
    """gamma of the profile with a width, which must be below 12^(-1/2), the width at gamma = 0.

    The largest root of width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def state_of(width: float) -> str:
    """Name of the average of a width among the states of a checkpoint."""
    return f"average_{width:g}"


class PowerAverage(MovingAverage):
    """The average of the weights of all updates with the profile of a width."""

    def __init__(self, masters: list[Fragment], width: float) -> None:
        super().__init__(masters, decay=1.0, state=state_of(width))
        self.width = width
        self._exponent = exponent_of(width)

    def _decay_at(self, updates: torch.Tensor) -> torch.Tensor:
        return (1 - 1 / updates) ** (self._exponent + 1)


@dataclass(frozen=True)
class Profile:
    """The profile of an average: its width, and the number of updates done."""

    width: float
    updates: int


def combine(stored: Sequence[Profile], wanted: Profile) -> tuple[npt.NDArray[np.float64], float]:
    """Factors of stored averages, (n,), whose sum is nearest to the wanted one, and the error of its profile.

    Least squares over the profiles. The error is a share of the norm of the wanted profile. Raises UserError if it is
    above MAX_ERROR.
    """
    right = _products(stored, [wanted])[:, 0]
    factors = np.linalg.lstsq(_products(stored, stored), right, rcond=None)[0]
    norm = _products([wanted], [wanted])[0, 0]
    square = factors @ _products(stored, stored) @ factors - 2 * factors @ right + norm
    error = float(np.sqrt(max(0.0, square) / norm))
    if error > MAX_ERROR:
        widths = ", ".join(f"{width:g}" for width in sorted({profile.width for profile in stored}))
        raise UserError(
            f"{len(stored)} stored averages of widths {widths} give an average of width {wanted.width:g} only with an "
            f"error of {error:.0%} of its profile, at most {MAX_ERROR:.0%} is accepted. Choose a width nearer to "
            f"these, or train with a smaller train.ema_snapshot_every."
        )
    return factors, error


def _products(left: Sequence[Profile], right: Sequence[Profile]) -> npt.NDArray[np.float64]:
    """Inner products of profiles, the integrals of p q over tau: (n, m)."""
    a, t = _columns(left)
    b, u = (values.T for values in _columns(right))
    shorter = np.minimum(t, u)
    constant = (a + 1) * (b + 1) / (a + b + 1) / np.maximum(t, u)
    return np.asarray(constant * (shorter / t) ** a * (shorter / u) ** b)


def _columns(profiles: Sequence[Profile]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """gamma and number of updates of each profile: (n, 1) both."""
    exponents = [[exponent_of(profile.width)] for profile in profiles]
    return np.array(exponents), np.array([[float(profile.updates)] for profile in profiles])
