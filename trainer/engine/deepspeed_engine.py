"""DeepSpeed: process group, engine, settings, optimizer step and shutdown.

Reads the launcher's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and the recipe.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import deepspeed.comm as dist
import deepspeed.ops
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler

from retrieval.errors import NodeError, UserError
from trainer.engine.batch_split import nearest_split
from trainer.engine.eight_bit import check_8bit
from trainer.engine.optimizer import learning_rate_at, make_optimizer
from trainer.engine.scattered_gradients import is_scattered, scatter_gradients
from trainer.recipe import TrainConfig

ROW = 1 << 14
"""Elements of a gradient of which a norm is computed in fp32."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, number of ranks, and device of this process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on rank 0, which logs and writes the files of the run."""
        return self.rank == 0


def join_ranks(timeout_minutes: int = 60) -> Ranks:
    """Join the process group of the launcher's environment variables. Collectives fail after the timeout."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # ZeRO imports the Muon optimizer, which we do not use; its decorators would load torch's compiler for two seconds.
    compiler.compile = lambda: lambda function: function
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would probe all its operations, which runs a compiler, to compile its shared-memory collectives,
        # which takes a minute.
        deepspeed.ops.__compatible_ops__ = {}
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))
    device = torch.device(get_accelerator().current_device_name())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def gloo_group(timeout_minutes: int) -> Any:
    """All ranks as a process group of its own, for threads that communicate while the training does. A collective.

    Raises UserError if the machines do not reach each other.
    """
    try:
        return torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    except RuntimeError as error:
        raise UserError(
            f"Gloo, which publishes checkpoints, does not connect the ranks: {error}. Set GLOO_SOCKET_IFNAME on each "
            f"machine to its network interface to the others, such as eth0."
        ) from error


@contextmanager
def raised_on_all(ranks: Ranks) -> Iterator[None]:
    """If the block fails on some ranks, raise an error on all that names the first of these. A collective.

    The rank that failed raises its own error. The others raise NodeError or UserError if it did, else RuntimeError.
    Ranks that went on alone would wait for the others until the timeout. So would an error before a collective of the
    block.
    """
    try:
        yield
    except Exception as error:
        _gather_problems(error, ranks)  # if this fails too, its traceback shows both
        raise
    for rank, problem in enumerate(_gather_problems(None, ranks)):
        if problem is not None:
            message, kind = problem
            raise kind(f"rank {rank}: {message}")


def _gather_problems(error: Exception | None, ranks: Ranks) -> list[tuple[str, type[Exception]] | None]:
    """Message and type of the errors of all ranks; None for those without an error. A collective."""
    problem: tuple[str, type[Exception]] | None = None
    if isinstance(error, UserError):
        problem = str(error), NodeError if isinstance(error, NodeError) else UserError
    elif error is not None:
        problem = f"{type(error).__name__}: {error}. The log of this rank has the traceback.", RuntimeError
    problems: list[tuple[str, type[Exception]] | None] = [problem] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(problems, problem)
    return problems


def use_deterministic_algorithms() -> None:
    """Let torch and cuDNN compute the same bits in every run on the same hardware. Call it before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this setting
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def leave_ranks(engine: deepspeed.DeepSpeedEngine | None = None) -> None:
    """Shut down the engine, if there is one, and the process group."""
    # Without the barrier a third of all successful runs end with SIGABRT.
    dist.barrier()
    if engine is not None:
        engine.destroy()
    dist.destroy_process_group()


def check_ranks(config: TrainConfig, world: int) -> None:
    """Raise UserError if the batch or the optimizer does not fit `world` ranks, or its package is missing."""
    accumulation_steps(config, world)
    check_8bit(config, world)


def accumulation_steps(config: TrainConfig, world: int) -> int:
    """Micro batches per step on each of `world` ranks. Raises UserError if the batch cannot be split."""
    share = config.micro_batch * world
    if config.global_batch % share:
        split = nearest_split(config.global_batch, config.micro_batch, world)
        is_same = split.global_batch == config.global_batch
        batch = "" if is_same else f"train.global_batch to a multiple of {world} such as {split.global_batch} and "
        raise UserError(
            f"train.global_batch {config.global_batch} cannot be split over {world} ranks in micro batches of "
            f"{config.micro_batch}: set {batch}train.micro_batch to {split.micro_batch}, or take another number."
        )
    return config.global_batch // share


def engine_settings(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed settings of a run on these ranks. Raises UserError if the batch or the optimizer does not fit."""
    check_ranks(config, ranks.world)
    is_skipped_by_deepspeed = config.zero_stage > 0 and not skips_on_device(config)
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, ranks.world),
        # Else `optimizer_step` clips and skips.
        "gradient_clipping": config.max_grad_norm if is_skipped_by_deepspeed else 0.0,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": is_skipped_by_deepspeed},
        "communication_data_type": "fp32" if config.reduce_in_fp32 else None,  # None: that of the network
        # One gradient buffer saves GPU memory; on a CPU it adds 10 % to the time of a small step. In bf16 CPUs have it
        # too, so that tests on a CPU run the combination that GPUs run.
        "zero_optimization": {
            "stage": config.zero_stage,
            "compute_grad_norm": is_skipped_by_deepspeed or not config.zero_stage,
            "contiguous_gradients": ranks.device.type == "cuda" or config.precision == "bf16",
            # Gradients are reduced while the backward pass goes on; a CPU has no streams for it.
            "overlap_comm": ranks.device.type == "cuda" and ranks.world > 1,
        },
        "zero_allow_untested_optimizer": True,
        # It would wait for the device at the start and the end of every micro batch.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": config.steps + 1,
    }


def make_engine(unet: Any, config: TrainConfig, ranks: Ranks) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine with the network and its optimizer. All ranks get the weights of rank 0."""
    settings = engine_settings(config, ranks)
    if config.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.channels_last:
        unet.register_forward_pre_hook(_to_channels_last)
    if config.compile:
        unet.compile(dynamic=False)
    engine, *_ = deepspeed.initialize(
        model=unet, optimizer=make_optimizer(unet, config), config=settings, dist_init_required=False
    )
    if is_scattered(config, ranks.world, ranks.device) or (ranks.world == 1 and not config.zero_stage):
        # `optimizer_step` reduces gradients itself. With one rank it would only copy them.
        engine.enable_backward_allreduce = False
    return engine


def _to_channels_last(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, config: TrainConfig, step: int) -> float:
    """Set the learning rate of `step` (from 0) for all groups of parameters. Returns it."""
    rate = learning_rate_at(config, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate


def skips_on_device(config: TrainConfig) -> bool:
    """True if torch's fused AdamW skips non-finite gradients on the device, so that the host need not wait for them.

    With sharded weights DeepSpeed decides it on the host; AdamW of bitsandbytes cannot skip.
    """
    return config.zero_stage < 3 and config.optimizer == "adamw"


def optimizer_step(engine: deepspeed.DeepSpeedEngine, config: TrainConfig) -> torch.Tensor:
    """Update after a step's last micro batch. Returns the global gradient norm before clipping; 0 after the others.

    The norm is a scalar on the device. A non-finite gradient changes nothing on any rank, and the norm is not finite.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return torch.zeros((), device=engine.device)
    if config.zero_stage and not skips_on_device(config):
        engine.step()
        return torch.full((), float(engine.get_global_grad_norm()), dtype=torch.float64, device=engine.device)
    if not skips_on_device(config):
        # Gradients are already averaged over ranks.
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), config.max_grad_norm or torch.inf)
        if not torch.isfinite(norm):
            engine.module.zero_grad(set_to_none=True)  # the optimizer leaves weights without a gradient as they are
        engine.step()
        return norm
    if is_scattered(config, dist.get_world_size(), engine.device):
        scatter_gradients(engine)
    norm = _partitioned_norm(engine) if config.zero_stage else _whole_norm(engine)
    adamw = engine.optimizer.optimizer if config.zero_stage else engine.optimizer
    # AdamW divides by it: no pass over the gradients. DeepSpeed itself would wait for the norm.
    adamw.grad_scale = torch.clamp((norm + 1e-6) / (config.max_grad_norm or torch.inf), min=1)
    adamw.found_inf = (~torch.isfinite(norm)).float()
    engine.step()
    return norm


def _whole_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """Norm of the gradients of all parameters, which are averaged over ranks."""
    return torch.nn.utils.get_total_norm(
        [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    )


def _partitioned_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """Norm of the gradients that ZeRO 1 or 2 has divided among the ranks."""
    gradients = [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group]
    square = torch.cat([row_norms(gradient) for gradient in gradients]).double().square().sum().float()
    dist.all_reduce(square)
    return square.sqrt()


def row_norms(values: torch.Tensor) -> torch.Tensor:
    """Norms of ROW elements each, and of the rest: (n,) float32. On a CPU the norm of millions in fp32 loses digits."""
    rest = values.numel() % ROW
    rows, last = values.flatten().split([values.numel() - rest, rest])
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return torch.cat([norm(rows.view(-1, ROW), dim=1), norm(last)[None]])


def gather_numbers(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The values of all ranks, (world, n) on the CPU, on every rank. values: (n,) on the device."""
    gathered = [torch.empty_like(values) for _ in range(ranks.world)]
    dist.all_gather(gathered, values)
    return torch.stack(gathered).cpu()
