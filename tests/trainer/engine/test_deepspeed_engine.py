"""The settings of the engine that change speed: they leave the losses as they are."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch

from benchmarks.common.processes import set_single_rank
from tests.trainer.training.launched import fork
from tests.trainer.training_set import make_recipe
from trainer.engine.deepspeed_engine import Ranks, engine_settings, join_ranks, make_engine, optimizer_step, row_norms
from trainer.model.unet import build_unet


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank, whose collectives wait for 7 minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
        set_single_rank()
        yield join_ranks(timeout_minutes=7)
    dist.destroy_process_group()


def losses(ranks: Ranks, **changes: object) -> list[float]:
    """The losses of three steps."""
    recipe = make_recipe("", global_batch=2, warmup_steps=0, **changes)
    torch.manual_seed(0)
    model = recipe.model.model_copy(update={"channels": (32,), "attention": (1,)})
    engine = make_engine(build_unet(model), recipe.train, ranks)
    dtype = next(engine.module.parameters()).dtype
    x_t, context = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 4, 32).to(dtype)
    values = []
    for _ in range(3):
        loss = engine(x_t, torch.tensor([10, 500]), context, return_dict=False)[0].float().square().mean()
        engine.backward(loss)
        optimizer_step(engine, recipe.train)
        values.append(loss.item())
    engine.destroy()
    return values


@pytest.mark.parametrize(
    ("change", "precision", "tolerance"), [("compile", "fp32", 1e-5), ("channels_last", "bf16", 1e-2)]
)
def test_settings_for_speed_leave_the_losses_as_they_are(
    change: str, precision: str, tolerance: float, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        # The graph is traced as in use; only code generation, which takes minutes, is left out.
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    expected = losses(ranks, precision=precision)
    assert not compiled
    assert losses(ranks, precision=precision, **{change: True}) == pytest.approx(expected, rel=tolerance)
    assert bool(compiled) == (change == "compile")
    assert expected[0] != expected[1] != expected[2]


def test_channels_last_orders_the_activations(ranks: Ranks) -> None:
    config = make_recipe("", channels_last=True, global_batch=2).train
    unet = build_unet(make_recipe("").model)
    orders = []
    unet.conv_in.register_forward_hook(
        lambda _, inputs, output: orders.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    engine = make_engine(unet, config, ranks)
    engine(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 4, 32))
    assert orders == [True]
    engine.destroy()


def test_collectives_wait_as_long_as_the_recipe_says(ranks: Ranks) -> None:
    options = torch.distributed.distributed_c10d._get_default_group()._get_backend(ranks.device).options
    assert options._timeout == timedelta(minutes=7)


def test_gradients_are_reduced_during_the_backward_pass_on_several_gpus() -> None:
    config = make_recipe("").train
    for device, world, overlaps in (("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)):
        settings = engine_settings(config, Ranks(0, world, torch.device(device)))
        assert settings["zero_optimization"]["overlap_comm"] == overlaps


def test_the_norm_of_millions_of_gradients_keeps_its_digits() -> None:
    gradient = torch.randn(1001, 1999, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    assert torch.linalg.vector_norm(row_norms(gradient).double()).item() == pytest.approx(expected, rel=1e-6)


def test_two_ranks_send_what_the_guide_counts(tmp_path: Path) -> None:
    code, log = fork(["traffic_rank"], tmp_path / "log", 2)
    assert code == 0, log


def test_any_error_of_one_rank_is_raised_on_all_and_stays_a_fault_of_a_node(tmp_path: Path) -> None:
    code, log = fork(["failing_rank"], tmp_path / "log", ranks=2)
    assert code == 0, log
