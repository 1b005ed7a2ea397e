"""The stand-in that counts waits for a GPU on a CPU."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.common.device_waits import SimulatedWaits, counted_waits

DEVICE = torch.device("cpu")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


def test_a_value_of_the_gpu_is_waited_for_once_and_its_copy_is_not(weight: torch.Tensor) -> None:
    with SimulatedWaits([]) as counted:
        losses = (weight * 2).cpu()
        assert losses.isfinite().all()
        assert losses.tolist() == [2, 2, 2]
        assert float(losses.mean()) == 2
    assert counted.waits == ["cpu"]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda weight: weight.sum().item(), "item"),
        (lambda weight: float(weight.sum()), "__float__"),
        (lambda weight: bool((weight > 0).all()), "__bool__"),
        (lambda weight: weight[weight > 0], "__getitem__"),
        (lambda weight: f"{weight.sum():.1f}", "__format__"),
        (lambda weight: weight.detach().nonzero(), "nonzero"),
        (lambda weight: torch.tensor([1.0], device=DEVICE), "tensor"),
    ],
)
def test_reading_a_value_waits(weight: torch.Tensor, read: object, name: str) -> None:
    with SimulatedWaits([]) as counted:
        read(weight)  # type: ignore[operator]
    assert counted.waits == [name]


def test_a_copy_to_the_gpu_waits_unless_it_is_asynchronous(weight: torch.Tensor) -> None:
    batch = torch.zeros(4, 3)
    with SimulatedWaits([batch]) as counted:
        assert batch[1:].sum().item() == 0
        product = batch[:2].half().to(DEVICE, torch.float32, non_blocking=True) * weight
        assert counted.waits == []
        product.sum().item()
        (batch.to(DEVICE) * weight).detach().copy_(batch)
        weight.detach().to(torch.float64)
    assert counted.waits == ["item", "to", "copy_"]


def test_waits_of_the_hooks_of_a_backward_pass_count(weight: torch.Tensor) -> None:
    weight.register_hook(lambda gradient: print(gradient.max().item()))
    with SimulatedWaits([]) as counted:
        (2 * weight).sum().backward()
    assert counted.waits == ["item"]
    assert weight.grad is not None


def test_synchronizations_count() -> None:
    with counted_waits() as waits:
        get_accelerator().synchronize()
    assert waits == ["synchronize"]
