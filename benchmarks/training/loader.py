"""`make bench-loader`: does reading the training set ever starve the step? (images and latents, per core)

Makes real shards from a seed: tars of JPEGs with shorter edges of 768 px and more, neighbors of k = 8 by 768,
latents. Times the loader alone, in interleaved rounds, and a consumer that takes a third of what it can
give. Carries the rate per core to what 8 A100s ask for. Writes `docs/loader.json` and `docs/loader.md`.
"""

import argparse
import io
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common.report import DOCS, SCRATCH, markdown_table, thread_count, write_report
from benchmarks.training.schedule import GPUS, MFU, stages
from benchmarks.training.training_data import PICTURES, QUALITY, Extent, picture, prepare
from jobs.reporting.hardware import hardware
from retrieval.storage.root import Root
from trainer.data.images import MIN_DRAFT_RATIO, ScaledImage, decode_image, random_crop
from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan, make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import AutoencoderConfig, TrainingRecipe

HEADROOM = 3
"""The loader is to give this many times what the step takes."""
BATCH = 64
FULL = Extent(shards=8, rows=256, k=8, dim=768, size=256, factor=16, channels=16, edge=768)
TINY = Extent(shards=2, rows=40, k=2, dim=8, size=32, factor=16, channels=4, edge=64)
SOURCES = ("images", "latents")
THREADS = (1, 2)

INTRO = """Written by `make bench-loader`; the numbers are in `loader.json`.

**Machine:** {hardware}.

**Data:** {images:,} samples in {shards} shards made from a seed: JPEGs of quality {quality} with shorter
edges of {edge} to {twice} px ({megapixels:.1f} megapixels, {kilobytes:.0f} kB on average), cut to {size} px;
neighbors of k = {k} by {dim}; latents of {shape}. Everything is in the page cache: what a disk or a network
adds is not in here.

**Method:** batches of {batch}, {rounds} interleaved rounds, medians. A core's rate is images over CPU
seconds of all threads, so that it holds on a busy machine too."""

PACED = """**A consumer that takes a third of that rate** waits this long for a batch, the first one not
counted:"""

NEEDS = """**What 8 A100s ask for.** Stage 1 needs {flops:.1f} GFLOP of the UNet an image; at {mfu:.0%} of
312 TFLOP/s each, {gpus} GPUs take {demand:,.0f} images/s. Three times that, on cores like this machine's
(arithmetic, not measured):"""

CUT = """**One image, one thread:** decoding the JPEG whole, then cutting a square: {whole_ms:.2f} ms.
Decoding it at a half, a quarter or an eighth of its size where {gap} times the wanted edges are left
(`trainer/data/images.py`): {small_ms:.2f} ms, {ratio:.2f} times as fast."""


def main() -> None:
    """Make the data, measure, write."""
    options = _options()
    extent, batches, rounds = (TINY, 2, 1) if options.tiny else (FULL, 8, options.rounds)
    root = Root(options.scratch / ("loader-tiny" if options.tiny else "loader"))
    autoencoder = prepare(root, extent)
    plans = {
        (source, count): make_plan(
            _recipe(extent, autoencoder, source, count), root, Autoencoder.load(autoencoder, "cpu")
        )
        for source in SOURCES
        for count in THREADS
    }
    timed: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in plans}
    for _ in range(rounds):
        for case, plan in plans.items():
            timed[case].append(measure(plan, root, batches))
    cases = [_summary(case, plans[case], root, rates, batches) for case, rates in timed.items()]
    result = {
        "hardware": hardware(),
        "extent": vars(extent),
        "rounds": rounds,
        "batch": BATCH,
        "cases": cases,
    }
    result |= {"cut": cut(extent), "demand": demand()}
    write_report(options.scratch if options.tiny else options.docs, "loader", result, page(result))


def measure(plan: TrainingPlan, root: Root, batches: int) -> dict[str, float]:
    """Images a second, and a CPU second, of a loader whose shards are open and which has nothing ahead."""
    loader = Loader(plan, root, 0, 1)
    for step in range(2):
        loader.batch(step)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch.image_ids) for batch in loader.batches(2, 2 + batches))
    return {
        "images_per_s": count / (time.perf_counter() - wall),
        "images_per_core_s": count / (time.process_time() - cpu),
    }


def waiting(plan: TrainingPlan, root: Root, batches: int, images_per_s: float) -> float:
    """Mean seconds that a consumer of so many images a second waits for a batch."""
    waited = []
    arriving = Loader(plan, root, 0, 1).batches(0, batches + 1)
    for _ in range(batches + 1):
        asked = time.perf_counter()
        batch = next(arriving)
        waited.append(time.perf_counter() - asked)
        time.sleep(len(batch.image_ids) / images_per_s)
    arriving.close()
    return statistics.fmean(waited[1:])


def cut(extent: Extent) -> dict[str, float]:
    """Milliseconds from a JPEG's bytes to its square, decoded whole and decoded small, and the mean JPEG."""
    pictures = [picture(number, extent.edge) for number in range(PICTURES)]
    times: dict[str, list[float]] = {"whole_ms": [], "small_ms": []}
    for data in pictures:
        for name, opened in (("small_ms", decode_image), ("whole_ms", _decode_whole)):
            began = time.thread_time()
            random_crop(opened(data, "", extent.size), (0, 0, 0), flip=True)
            times[name].append((time.thread_time() - began) * 1000)
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures]
    return {
        **{name: statistics.fmean(values) for name, values in times.items()},
        "megapixels": statistics.fmean(width * height for width, height in sizes) / 1e6,
        "kilobytes": statistics.fmean(map(len, pictures)) / 1e3,
    }


def demand() -> dict[str, float]:
    """What the first stage of the paper's schedule takes from the loader."""
    stage = stages()[0]
    return {"gflops": stage.flops / 1e9, "images_per_s": stage.images_per_s()}


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    extent, cases, asked = Extent(**result["extent"]), result["cases"], result["demand"]
    intro = INTRO.format(
        **vars(extent) | {"images": extent.shards * extent.rows, "twice": 2 * extent.edge},
        **{name: result[name] for name in ("hardware", "rounds", "batch")},
        **{name: result["cut"][name] for name in ("megapixels", "kilobytes")},
        shape=" x ".join(map(str, extent.shape)),
        quality=QUALITY,
    )
    rates = [
        [
            f"{case['source']}, {thread_count(case['threads'])}",
            f"{case['images_per_s']:,.0f}",
            f"{case['images_per_core_s']:,.0f}",
        ]
        for case in cases
    ]
    paced = [
        [
            f"{case['source']}, {thread_count(case['threads'])}",
            f"{case['taken_per_s']:,.0f}",
            f"{case['waiting_s'] * 1000:.1f}",
            f"{case['waiting_s'] / case['step_s']:.1%}",
        ]
        for case in cases
    ]
    needs = NEEDS.format(flops=asked["gflops"], mfu=MFU, gpus=GPUS, demand=asked["images_per_s"])
    cores = [
        [case["source"], f"{case['images_per_core_s']:,.0f}", f"{cores_for(case, asked):,.0f}"]
        for case in cases
        if case["threads"] == max(THREADS)
    ]
    parts = [
        "# Does the loader keep up?",
        intro,
        markdown_table(["", "images/s:", "images/s and core:"], rates),
    ]
    parts += [PACED, markdown_table(["", "images/s taken:", "ms waited:", "of the step:"], paced)]
    parts += [
        needs,
        markdown_table(["source", "images/s and core:", f"cores for {HEADROOM} times the demand:"], cores),
    ]
    found = result["cut"]
    parts.append(CUT.format(**found, gap=MIN_DRAFT_RATIO, ratio=found["whole_ms"] / found["small_ms"]))
    return "\n\n".join(parts) + "\n"


def cores_for(case: dict[str, float], asked: dict[str, float]) -> float:
    """Cores that give HEADROOM times the demand."""
    return HEADROOM * asked["images_per_s"] / case["images_per_core_s"]


def _summary(
    case: tuple[str, int], plan: TrainingPlan, root: Root, rates: list[dict[str, float]], batches: int
) -> dict[str, Any]:
    found = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
    taken = found["images_per_s"] / HEADROOM
    waited = waiting(plan, root, batches, taken)
    source, count = case
    return {"source": source, "threads": count, **found, "taken_per_s": taken} | {
        "step_s": BATCH / taken,
        "waiting_s": waited,
    }


def _decode_whole(data: bytes, where: str, size: int) -> ScaledImage:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return ScaledImage(image, image.size, decode_image(data, where, size).edges, size)


def _recipe(extent: Extent, autoencoder: AutoencoderConfig, source: str, workers: int) -> TrainingRecipe:
    train = {"name": "bench", "source": source, "size": extent.size, "k": extent.k, "steps": 1000}
    train |= {
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "interleaved_shards": extent.shards,
        "workers": workers,
    }
    model = {
        "latent_channels": extent.channels,
        "context_dim": extent.dim,
        "channels": [32],
        "attention": [1],
    }
    return TrainingRecipe.model_validate(
        {"model": model, "diffusion": {}, "autoencoder": autoencoder, "train": train}
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.loader", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where data go")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a look at the machinery; writes to the scratch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
