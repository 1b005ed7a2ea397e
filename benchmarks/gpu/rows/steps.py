"""Row 2: the training step of the 1.3B UNet, as the trainer makes it from the recipe's settings.

The batch size is searched once at each resolution, without compilation; compiled cases take the fastest that was found.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.processes import set_single_rank
from benchmarks.gpu.day import (
    Cases,
    Day,
    Values,
    free_memory,
    matrix_product,
    memory_gib,
    profile,
    timed,
    training_stage,
)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BATCHES = {256: (64, 128, 192, 256, 384, 512), 512: (16, 32, 48, 64, 96, 128), 768: (8, 16, 24, 32, 48, 64)}
AIM_MFU = 0.5


def cases(day: Day) -> Cases:
    """Cases by name; the most important first, because the row's minutes may end before the last."""
    step = partial(measure, day)
    compiled = {"compile": True}
    return {
        "matrix product": lambda: {"tflop_per_s": round(matrix_product(day) / 1e12, 1)},
        "256 px": lambda: step(256, {}),
        "256 px, compiled": lambda: step(256, compiled),
        "profile, 256 px": lambda: step(256, {}, with_profile=True),
        "256 px, channels last": lambda: step(256, {"channels_last": True}),
        "256 px, compiled, channels last": lambda: step(256, {**compiled, "channels_last": True}),
        "256 px, checkpointing": lambda: step(256, {"activation_checkpointing": True}),
        **{
            f"256 px, {name} attention": partial(step, 256, {}, backend=backend)
            for name, backend in ({} if day.tiny else BACKENDS).items()
        },
        "512 px": lambda: step(512, {}),
        "768 px": lambda: step(768, {}),
        "768 px, checkpointing": lambda: step(768, {"activation_checkpointing": True}),
        "512 px, compiled": lambda: step(512, compiled),
        "768 px, compiled": lambda: step(768, compiled),
        "profile, 256 px, compiled": lambda: step(256, compiled, with_profile=True),
    }


def measure(
    day: Day, size: int, changes: Values, backend: SDPBackend | None = None, with_profile: bool = False
) -> Values:
    """Images per second at the fastest batch size, MFU, memory, waits for the device; or a profile at that size."""
    from trainer.engine.deepspeed_engine import join_ranks, make_engine
    from trainer.model.recipe import DiffusionConfig
    from trainer.model.unet import build_unet
    from trainer.training.objective import Objective

    stage = training_stage(day, size)
    if not torch.distributed.is_initialized():
        set_single_rank()
        join_ranks()
    ranks = _ranks(day)
    config = stage.train.model_copy(update={"global_batch": 1, "micro_batch": 1, **changes})
    torch.manual_seed(0)
    with ranks.device:
        unet = build_unet(stage.model)
    engine = make_engine(unet, config, ranks)
    objective = Objective(DiffusionConfig(), None, ranks.device)
    with sdpa_kernel([backend]) if backend else nullcontext():
        if with_profile:
            values: Values = {"profile": profile(_step(engine, objective, stage, _best_batch(day, size)))}
        else:
            values = _fastest(day, size, changes, partial(_step, engine, objective, stage))
            values |= _utilization(stage, values["images_per_s"])
    engine.destroy()
    return values


def _fastest(day: Day, size: int, changes: Values, make_step: Any) -> Values:
    """Search the batch sizes upwards until memory is short; with a known fastest one, measure it alone."""
    known = _best_batch(day, size)
    searched = known is None or "activation_checkpointing" in changes
    batches = (1, 2) if day.tiny else BATCHES[size]
    values: Values = {"tried": {}}
    for batch in batches if searched else [known]:
        free_memory()
        step = make_step(batch)
        try:
            seconds = timed(step, 1 if day.tiny else 5)
        except torch.OutOfMemoryError:
            if "images_per_s" not in values:
                raise
            break
        rate = round(batch / seconds, 2)
        values["tried"][str(batch)] = rate
        if rate > values.get("images_per_s", 0.0):
            values |= {"images_per_s": rate, "batch": batch, "memory_gib": memory_gib(), "waits": _waits(step)}
    return values


def _best_batch(day: Day, size: int) -> int | None:
    return day.earlier.get(f"{size} px", {}).get("batch")


def _waits(step: Any) -> int:
    """How often the CPU waits for the GPU in a step, as torch counts it; without a GPU, by a stand-in."""
    from benchmarks.common.device_waits import counted_waits

    with counted_waits() as waits:
        step()
    return len(waits)


def _utilization(stage: Any, rate: float) -> Values:
    """MFU against the data sheet, and the rate at which the aim would be reached."""
    from trainer.tracking.flops import device_name, known_peak

    peak = known_peak(device_name(torch.device("cuda", 0))) if torch.cuda.is_available() else None
    if peak is None:
        return {}
    return {"mfu": round(rate * stage.flops / peak, 4), "aim": round(AIM_MFU * peak / stage.flops, 1)}


def _ranks(day: Day) -> Any:
    from trainer.engine.deepspeed_engine import Ranks

    return Ranks(0, 1, day.device)


def _step(engine: Any, objective: Any, stage: Any, batch: int | None) -> Any:
    """A function that does one training step on a batch of random latents in memory."""
    from trainer.data.loader import TrainingBatch
    from trainer.engine.deepspeed_engine import optimizer_step

    count = batch or 1
    shape = stage.latent_shape
    context = torch.nn.functional.normalize(torch.randn(count, stage.train.k, stage.model.context_dim), dim=-1)
    samples = TrainingBatch(
        image_ids=torch.arange(count).numpy(),
        inputs=torch.randn(count, 2 * shape[0], *shape[1:]).half(),
        context=context.half(),
        timesteps=torch.randint(1000, (count,)),
        posterior_noise=torch.randn(count, *shape),
        noise=torch.randn(count, *shape),
    )
    dtype = next(engine.module.parameters()).dtype

    def step() -> None:
        engine.backward(objective(engine, samples, dtype).mean())
        optimizer_step(engine, stage.train)

    return step
