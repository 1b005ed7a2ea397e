"""Row 1: does the GPU compute what the CPU computes? Encoder, join, k-means, training, resuming, export and sampling.

Every case has a `difference` and its `tolerance`; `equal` says whether it is within it.
"""

import numpy as np
import torch
from PIL import Image

from benchmarks.common.processes import set_single_rank
from benchmarks.gpu.day import Cases, Day, Values, encoder
from benchmarks.gpu.rows.join import clustered, write_partition
from benchmarks.gpu.rows.training import TINY, delete_run, read_metrics, run_training, training_root

SMALL = {**TINY, "train.log_every": 1, "train.learning_rate": 1e-3, "train.deterministic": True}


def cases(day: Day) -> Cases:
    """Cases by name. The last two use the runs of those before."""
    return {
        "encoder, bf16": lambda: encoder_bf16(day),
        "join, exact": lambda: join(day, 0),
        "join, lists": lambda: join(day, 32),
        "k-means": lambda: kmeans(day),
        "training, fp32, ZeRO 0": lambda: training(day, "fp32", 0, 1e-3),
        "training, bf16, ZeRO 1": lambda: training(day, "bf16", 1, 2e-2),
        "resumed, bf16": lambda: resumed(day),
        "exported and sampled": lambda: sampled(day),
    }


def compared(difference: float, tolerance: float, **values: object) -> Values:
    """The values of a case."""
    return {"difference": difference, "tolerance": tolerance, "equal": difference <= tolerance, **values}


def encoder_bf16(day: Day) -> Values:
    """1 - cosine of the vectors in bf16 on the device and in fp32 on the CPU, the largest of all pictures."""
    exact, fast = encoder(day, "cpu", "fp32"), encoder(day, str(day.device), "bf16")
    noise = np.random.default_rng(0).integers(0, 256, (4 if day.tiny else 64, 300, 300, 3), np.uint8)
    pixels = torch.stack([exact.pixels(Image.fromarray(picture)) for picture in noise])
    ours, wanted = fast.encode_pixels(pixels).cpu(), exact.encode_pixels(pixels)
    return compared(1 - torch.nn.functional.cosine_similarity(ours, wanted).min().item(), 5e-3, pictures=len(noise))


def join(day: Day, lists: int) -> Values:
    """Share of the neighbors that a join on the device does not have in common with the same join on the CPU."""
    from retrieval.join.join import join_partition
    from retrieval.recipe import JoinConfig

    rows, queries = (2_000, 200) if day.tiny else (50_000, 2_000)
    partition = write_partition(day, rows, 64 if day.tiny else 768)
    vectors = clustered(day, queries, partition.embeddings.shape[1], seed=1).float().cpu().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = JoinConfig(k=8, near_copy_similarity=0.96, partitions_per_query=1, lists_per_partition=lists)
    ours = join_partition(partition, vectors, config, str(day.device))
    wanted = join_partition(partition, vectors, config)
    pairs = zip(ours.positions, wanted.positions, strict=True)
    different = 1 - float(np.mean([len(np.intersect1d(*pair)) / config.k for pair in pairs]))
    return compared(different, 1e-3 if lists == 0 else 1e-2, rows=rows, queries=queries)


def kmeans(day: Day) -> Values:
    """Relative difference of the mean similarity of rows to their centroid after one step from the same centroids.

    By torch in bf16 on the device and by faiss in fp32 on the CPU.
    """
    from retrieval.index.kmeans import FaissSample, _step
    from retrieval.index.torch_products import TorchSample

    rows = clustered(day, 2_000 if day.tiny else 50_000, 64 if day.tiny else 256, seed=2).float()
    vectors = torch.nn.functional.normalize(rows, dim=1).cpu().numpy()
    means = []
    for sample in (TorchSample(vectors), FaissSample(vectors)):
        centroids = sample.take(np.arange(64))
        centroids, _ = _step(sample, centroids, np.random.default_rng(0))
        means.append(float((vectors @ centroids.T).max(axis=1).mean()))
    return compared(abs(means[0] / means[1] - 1), 1e-3, rows=len(vectors))


def training(day: Day, precision: str, zero_stage: int, tolerance: float) -> Values:
    """Largest relative difference of the losses of a seeded training on the device and on the CPU."""
    steps = _steps(day)
    settings = {**SMALL, "train.steps": steps, "train.precision": precision, "train.zero_stage": zero_stage}
    set_single_rank()
    for device in ("gpu", "cpu"):
        delete_run(day, f"{precision}-{device}")
    run_training(day, f"{precision}-gpu", settings)
    run_training(day, f"{precision}-cpu", settings, on_cpu=True)
    return compared(*_difference(day, f"{precision}-gpu", f"{precision}-cpu", tolerance), steps=steps)


def resumed(day: Day) -> Values:
    """Largest difference of the losses of a run that ended at half of its steps and continued: none is allowed."""
    set_single_rank()
    delete_run(day, "bf16-resumed")
    for steps in (_steps(day) // 2, _steps(day)):
        run_training(day, "bf16-resumed", {**SMALL, "train.steps": steps})
    return compared(*_difference(day, "bf16-resumed", "bf16-gpu", 0.0), steps=_steps(day))


def _steps(day: Day) -> int:
    return 4 if day.tiny else 20


def _difference(day: Day, name: str, other: str, tolerance: float) -> tuple[float, float]:
    losses = [np.array([metrics.loss for metrics in read_metrics(day, run)]) for run in (name, other)]
    return float(np.abs(losses[0] / losses[1] - 1).max()), tolerance


def sampled(day: Day) -> Values:
    """Relative difference of latents that the exported network draws in fp32 on the device and on the CPU."""
    from diffusers import UNet2DConditionModel

    from trainer.model.recipe import DiffusionConfig
    from trainer.model.schedulers import make_scheduler
    from trainer.sampling.denoising import guided_sample, initial_noise

    unet = UNet2DConditionModel.from_pretrained(training_root(day) / "runs/bf16-gpu/train/model").eval()
    edge = 16
    noise = initial_noise(range(2), (unet.config.in_channels, edge, edge))
    context = torch.nn.functional.normalize(torch.randn(2, 4, unet.config.cross_attention_dim), dim=-1)
    drawn = []
    for device in (day.device, torch.device("cpu")):
        with torch.inference_mode():
            inputs = (noise.to(device), context.to(device), torch.full((2,), 2.0, device=device))
            drawn.append(guided_sample(unet.to(device), make_scheduler("ddim", 20, DiffusionConfig()), *inputs).cpu())
    return compared(float((drawn[0] - drawn[1]).norm() / drawn[1].norm()), 1e-2)
