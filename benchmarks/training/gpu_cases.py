"""The cases of `benchmarks.training.gpu`: matrix product, training step, embedding, sampling.

Each case runs in a separate process, so that a case that runs out of memory does not affect the next:
`python -m benchmarks.training.gpu_cases CASE` takes a case as JSON and prints its values as JSON in the last line.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.processes import set_single_rank
from benchmarks.training.schedule import Stage, stages
from trainer.data.loader import TrainingBatch
from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.model.autoencoder import kl_f16
from trainer.model.unet import build_unet
from trainer.recipe import DiffusionConfig, ModelConfig, SchedulerName, TrainConfig
from trainer.sampling.denoising import guided_sample, initial_noise, make_scheduler
from trainer.tracking.flops import device_name, training_flops
from trainer.training.objective import Objective

TINY_MODEL = ModelConfig(
    latent_channels=4, context_dim=16, channels=(32, 64), attention=(1, 2), layers=1, norm_groups=8
)
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CONTEXT_TOKENS = 20
"""Tokens of the context in sampling: a prompt and its 19 neighbors."""


@dataclass(frozen=True)
class Case:
    """A measurement. tiny: with a network that is fast on a CPU, for tests."""

    kind: str
    """`matmul`, `train`, `embed` or `sample`."""
    size: int = 256
    """Edge of the images in pixels."""
    batch: int = 0
    """Batch size; 0 in `train` means the fastest that fits."""
    checkpointing: bool = False
    compile: bool = False
    backend: str = ""
    """Attention backend, a key of BACKENDS; empty: torch chooses."""
    scheduler: SchedulerName = "ddim"
    steps: int = 50
    tiny: bool = False


def run(case: Case) -> dict[str, Any]:
    """The measured values of a case. Raises torch.OutOfMemoryError if its batch does not fit."""
    measure = {"matmul": matmul, "train": train, "embed": embed, "sample": sample}[case.kind]
    return measure(case)


def device_of(case: Case) -> torch.device:
    """The GPU; for a tiny case the CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not case.tiny:
        raise SystemExit("torch finds no CUDA GPU. Run this benchmark on a GPU, or with --tiny.")
    return torch.device("cpu")


def matmul(case: Case) -> dict[str, Any]:
    """The best rate of a bf16 matrix product over several shapes, which kernels of the same device can reach."""
    device = device_of(case)
    best = 0.0
    for edge in (256,) if case.tiny else (4096, 8192, 12288):
        left, right = torch.randn(2, edge, edge, device=device, dtype=torch.bfloat16)
        seconds = timed(lambda left=left, right=right: left @ right, device, 3 if case.tiny else 30)
        best = max(best, 2 * edge**3 / seconds)
    return {"device": device_name(device), "flops_per_s": best, "torch": torch.__version__}


def train(case: Case) -> dict[str, Any]:
    """A step of the trainer: DeepSpeed, bf16 with fp32 master weights, one rank, latents in memory."""
    stage = _stage(case)
    set_single_rank()
    ranks = join_ranks()
    batches = [case.batch] if case.batch else _batch_sizes(case)
    values: dict[str, Any] = {}
    engine, objective = _engine(case, stage, ranks)
    for batch in batches:
        try:
            rate, memory = _step_rate(engine, objective, (case, stage, batch), ranks.device)
        except torch.OutOfMemoryError:
            if not values:
                raise
            break
        tried = {**values.get("tried", {}), str(batch): rate}
        if rate >= values.get("images_per_s", 0.0):
            values |= {"images_per_s": rate, "batch": batch, "memory_gib": memory}
        values |= {"tried": tried, "largest_batch": batch}
    engine.destroy()
    return values | {"flops": training_flops(stage.model, stage.latent_shape, stage.train.k)}


def embed(case: Case) -> dict[str, Any]:
    """The image encoder of ViT-L/14 with random weights in bf16, on 224 px tensors."""
    device = device_of(case)
    if case.tiny:
        model: Any = open_clip.model.CLIP(**TINY_CLIP)
    else:
        model = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None)
    model = model.to(device).eval()
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)

    @torch.inference_mode()
    def encode() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model.encode_image(images, normalize=True)

    seconds = timed(encode, device, 1 if case.tiny else 20)
    return {"images_per_s": case.batch / seconds, "memory_gib": _memory(device)}


def sample(case: Case) -> dict[str, Any]:
    """Guided sampling in bf16 and decoding by the KL autoencoder, as in `make sample`."""
    device, stage = device_of(case), _stage(case)
    unet = build_unet(stage.model).to(device).eval()
    width = (8, 4) if case.tiny else (128, 32)
    decoder = kl_f16(width[0], stage.latent_shape[0], width[1]).to(device).eval()
    denoise = torch.compile(unet) if case.compile else unet
    context = torch.randn(case.batch, CONTEXT_TOKENS, stage.model.context_dim, device=device)
    context = torch.nn.functional.normalize(context, dim=-1)
    noise = initial_noise(range(case.batch), stage.latent_shape).to(device)
    guidance = torch.full((case.batch,), 5.0, device=device)

    @torch.inference_mode()
    def draw() -> torch.Tensor:
        scheduler = make_scheduler(case.scheduler, case.steps, DiffusionConfig())
        with torch.autocast(device.type, torch.bfloat16):
            latents = guided_sample(denoise, scheduler, noise, context, guidance)
        return decoder.decode(latents).sample

    seconds = timed(draw, device, 1 if case.tiny else 3)
    return {"images_per_s": case.batch / seconds, "memory_gib": _memory(device)}


def timed(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of `times` calls, after two warm-up calls."""
    for _ in range(2):
        work()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _synchronize(device)
    return (time.perf_counter() - start) / times


def _stage(case: Case) -> Stage:
    if case.tiny:
        edge = case.size // 16
        config = TrainConfig(name="tiny", source="latents", size=case.size, k=2, global_batch=1, micro_batch=1, steps=1)
        return Stage("tiny", TINY_MODEL, config, (TINY_MODEL.latent_channels, edge, edge))
    (stage,) = [stage for stage in stages() if stage.name == f"train_laion_{case.size}"]
    return stage


def _engine(case: Case, stage: Stage, ranks: Ranks) -> tuple[Any, Objective]:
    with ranks.device:
        unet = build_unet(stage.model)
    if case.compile:
        unet.compile()
    changes = {"global_batch": 1, "micro_batch": 1, "precision": "bf16", "zero_stage": 1}
    changes |= {"activation_checkpointing": case.checkpointing}
    config = stage.train.model_copy(update=changes)
    return make_engine(unet, config, ranks), Objective(DiffusionConfig(), None, ranks.device)


def _step_rate(
    engine: Any, objective: Objective, run: tuple[Case, Stage, int], device: torch.device
) -> tuple[float, float]:
    """Images per second of training steps, and peak memory in GiB. run: case, stage, batch size."""
    case, stage, count = run
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = _batch(stage, count)
    dtype = next(engine.module.parameters()).dtype

    def step() -> None:
        engine.backward(objective(engine, batch, dtype).mean())
        optimizer_step(engine, stage.train)

    backends = [BACKENDS[case.backend]] if case.backend else list(BACKENDS.values())
    with sdpa_kernel(backends):
        seconds = timed(step, device, 1 if case.tiny else 8)
    return count / seconds, _memory(device)


def _batch(stage: Stage, count: int) -> TrainingBatch:
    channels, height, width = stage.latent_shape
    context = torch.nn.functional.normalize(torch.randn(count, stage.train.k, stage.model.context_dim), dim=-1)
    noises = torch.randn(2, count, channels, height, width)
    return TrainingBatch(
        image_ids=torch.arange(count).numpy(),
        inputs=torch.randn(count, 2 * channels, height, width).half(),
        context=context.half(),
        timesteps=torch.randint(1000, (count,)),
        posterior_noise=noises[0],
        noise=noises[1],
    )


def _batch_sizes(case: Case) -> list[int]:
    """Batch sizes to try, ascending: powers of two, and 1.5 times powers of two."""
    if case.tiny:
        return [1, 2]
    return sorted({base << power for base in (2, 3) for power in range(1, 9)})


def _memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave_process_group() -> None:
    """Destroy the process group, if there is one. Without the barrier some runs abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def case_as_json(case: Case) -> str:
    """A case as JSON, for the command line."""
    return json.dumps(asdict(case))


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))), flush=True)
    leave_process_group()
