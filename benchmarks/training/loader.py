"""`make bench-loader`: speed of the data loader per core, for images and for latents.

Generates shards from a seed: tars of JPEGs with shorter edges of 768 px and more, neighbor tables with k = 8 of 768
dimensions, latents. Times the loader alone in interleaved rounds, and with a consumer that takes a third of that rate.
Projects the number of cores for training on 8 A100s. Writes `docs/loader.json` and `docs/loader.md`.
"""

import argparse
import io
import math
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common.report import DOCS, SCRATCH, thread_count, write_report
from benchmarks.training import bytes_fetched, cold_reads
from benchmarks.training.schedule import GPUS, MFU, stages
from benchmarks.training.training_data import PICTURES, QUALITY, Extent, picture, prepare, training_recipe
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root
from trainer.data.images import MIN_DRAFT_RATIO, ScaledImage, decode_image, random_crop
from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan, make_plan
from trainer.model.autoencoder import Autoencoder

HEADROOM = 3
"""The loader must be this many times faster than the training step."""
BATCH = 64
PCIE = 25e9
"""Bytes per second of a copy from pinned memory."""
FULL = Extent(shards=8, rows=256, k=8, dim=768, size=256, factor=16, channels=16, edge=768)
TINY = Extent(shards=2, rows=40, k=2, dim=8, size=32, factor=16, channels=4, edge=64)
SOURCES = ("images", "latents")
THREADS = (1, 2)

INTRO = """Written by `make bench-loader`; the numbers are in `loader.json`.

**Machine:** {hardware}.

**Data:** {images:,} generated samples in {shards} shards: JPEGs of quality {quality} with shorter edges of
{edge} to {twice} px ({megapixels:.1f} megapixels, {kilobytes:.0f} kB on average), cropped to {size} px;
neighbors with k = {k} of {dim} dimensions; latents of {shape}. All files are in the page cache; the time of
a disk or a network is not included.

**Method:** batches of {batch}, {rounds} interleaved rounds, medians. The rate per core is images over the CPU
seconds of all threads, which does not depend on the load of the machine."""

PACED = """**Waiting time:** a consumer that takes a third of this rate waits this long for a batch, the
first batch not counted:"""

NEEDS = """**Cores for 8 A100s.** Stage 1 needs {flops:.1f} GFLOP of the UNet per image; at {mfu:.0%} of 312
TFLOP/s each, {gpus} GPUs take {demand:,.0f} images/s. Cores like those of this machine for three times this
rate (projected, not measured):"""

THREADED = """**Threads or processes.** With two threads an image takes {cpu:.1%} more CPU time, and the rate is
{ratio:.2f} times that of one thread: decoding releases Python's lock. Each rank is a process with threads of its own.
Instead of two threads, two processes could be {missing:.0%} faster at most, and would have to copy batches to the
rank. Processes, and more than two threads, were not measured."""

COPIES = """**Copies to a GPU** (counted, not measured). Batches are in pinned memory. If each GPU takes
{demand:,.0f} images/s, copies from there at {rate:.0f} GB/s (PCIe 4.0) take this share of a step. They run between the
kernels of the network; a stream of their own would save this share:"""

CROP = """**One image, one thread:** decoding the full JPEG and cropping a square takes {whole_ms:.2f} ms.
Decoding it at a half, a quarter or an eighth of its size, if the result has at least {gap} times the target
edges (`trainer/data/images.py`), takes {small_ms:.2f} ms: {ratio:.2f} times as fast."""


def main() -> None:
    options = _options()
    extent, batches, rounds = (TINY, 2, 1) if options.tiny else (FULL, 8, options.rounds)
    root = Root(options.scratch / ("loader-tiny" if options.tiny else "loader"))
    autoencoder = prepare(root, extent)
    plans = {
        (source, count): make_plan(
            training_recipe(extent, autoencoder, BATCH, source=source, workers=count, interleaved_shards=extent.shards),
            root,
            Autoencoder.load(autoencoder, "cpu"),
        )
        for source in SOURCES
        for count in THREADS
    }
    measured: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in plans}
    for _ in range(rounds):
        for case, plan in plans.items():
            measured[case].append(measure(plan, root, batches))
    cases = [_summary(case, plans[case], root, rates, batches) for case, rates in measured.items()]
    result = {"hardware": hardware(), "extent": vars(extent), "rounds": rounds, "batch": BATCH, "cases": cases}
    result |= {"cut": measure_cropping(extent), "demand": demand()}
    counted = bytes_fetched.TINY if options.tiny else bytes_fetched.EXTENT
    result["bytes"] = bytes_fetched.measure(options.scratch / "bytes-fetched", counted)
    kib = cold_reads.KIB[:2] if options.tiny else cold_reads.KIB
    result["cold"] = cold_reads.measure(root.local_path(""), extent, kib)
    write_report(options.scratch if options.tiny else options.docs, "loader", result, page(result))


def measure(plan: TrainingPlan, root: Root, batches: int) -> dict[str, float]:
    """Images per second and per CPU second of a loader with open shards and no prefetched batches."""
    loader = Loader(plan, root, 0, 1)
    for step in range(2):
        loader.batch(step)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch.image_ids) for batch in loader.batches(2, 2 + batches))
    return {
        "images_per_s": count / (time.perf_counter() - wall),
        "images_per_core_s": count / (time.process_time() - cpu),
    }


def waiting_time(plan: TrainingPlan, root: Root, batches: int, images_per_s: float) -> float:
    """Mean seconds that a consumer with this rate waits for a batch."""
    waited = []
    batches_ahead = Loader(plan, root, 0, 1).batches(0, batches + 1)
    for _ in range(batches + 1):
        start = time.perf_counter()
        batch = next(batches_ahead)
        waited.append(time.perf_counter() - start)
        time.sleep(len(batch.image_ids) / images_per_s)
    batches_ahead.close()
    return statistics.fmean(waited[1:])


def measure_cropping(extent: Extent) -> dict[str, float]:
    """Milliseconds to decode and crop a JPEG at full and at reduced size, and the mean size of the JPEGs."""
    pictures = [picture(number, extent.edge) for number in range(PICTURES)]
    times: dict[str, list[float]] = {"whole_ms": [], "small_ms": []}
    for data in pictures:
        for name, decode in (("small_ms", decode_image), ("whole_ms", _decode_whole)):
            start = time.thread_time()
            random_crop(decode(data, "", (extent.size, extent.size)), (0, 0, 0), flip=True)
            times[name].append((time.thread_time() - start) * 1000)
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures]
    return {
        **{name: statistics.fmean(values) for name, values in times.items()},
        "megapixels": statistics.fmean(width * height for width, height in sizes) / 1e6,
        "kilobytes": statistics.fmean(map(len, pictures)) / 1e3,
    }


def demand() -> dict[str, float]:
    """Rate of the first training stage of the paper's schedule."""
    stage = stages()[0]
    return {"gflops": stage.flops / 1e9, "images_per_s": stage.images_per_s()}


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    extent, cases, demand = Extent(**result["extent"]), result["cases"], result["demand"]
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
    needs = NEEDS.format(flops=demand["gflops"], mfu=MFU, gpus=GPUS, demand=demand["images_per_s"])
    cores = [
        [case["source"], f"{case['images_per_core_s']:,.0f}", f"{cores_for(case, demand):,.0f}"]
        for case in cases
        if case["threads"] == max(THREADS)
    ]
    parts = ["# Speed of the data loader", intro, markdown_table(["", "images/s:", "images/s per core:"], rates)]
    parts += [PACED, markdown_table(["", "images/s taken:", "ms waited:", "share of the step:"], paced)]
    parts += [needs, markdown_table(["source", "images/s per core:", f"cores for {HEADROOM} times the demand:"], cores)]
    parts += [threaded(cases), *copies(extent, demand["images_per_s"] / GPUS)]
    crop = result["cut"]
    parts.append(CROP.format(**crop, gap=MIN_DRAFT_RATIO, ratio=crop["whole_ms"] / crop["small_ms"]))
    parts += [bytes_fetched.page(result["bytes"]), cold_reads.page(result["cold"])]
    return "\n\n".join(parts) + "\n"


def threaded(cases: list[dict[str, float]]) -> str:
    """What the rates of one and two threads say of decoding in processes."""
    one, two = (case for case in cases if case["source"] == "images")
    ratio = two["images_per_s"] / one["images_per_s"]
    cpu = one["images_per_core_s"] / two["images_per_core_s"] - 1
    return THREADED.format(cpu=cpu, ratio=ratio, missing=two["threads"] / ratio - 1)


def copies(extent: Extent, images_per_s: float) -> list[str]:
    """Bytes that a sample copies to a GPU, and their share of the time. images_per_s: of a GPU."""
    latent = math.prod(extent.shape)
    shared = 2 * extent.k * extent.dim + 2 * 4 * latent  # neighbors in fp16, noise of the posterior and of the step
    counts = {"images": 3 * 4 * extent.size**2 + shared, "latents": 2 * 2 * latent + shared}
    rows = [[name, f"{count / 1e3:,.0f}", f"{count * images_per_s / PCIE:.1%}"] for name, count in counts.items()]
    table = markdown_table(["source", "kB per image:", "share of a step:"], rows)
    return [COPIES.format(rate=PCIE / 1e9, demand=images_per_s), table]


def cores_for(case: dict[str, float], demand: dict[str, float]) -> float:
    """Number of cores for HEADROOM times the demand."""
    return HEADROOM * demand["images_per_s"] / case["images_per_core_s"]


def _summary(
    case: tuple[str, int], plan: TrainingPlan, root: Root, rates: list[dict[str, float]], batches: int
) -> dict[str, Any]:
    medians = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
    taken = medians["images_per_s"] / HEADROOM
    waited = waiting_time(plan, root, batches, taken)
    source, count = case
    return {"source": source, "threads": count, **medians, "taken_per_s": taken} | {
        "step_s": BATCH / taken,
        "waiting_s": waited,
    }


def _decode_whole(data: bytes, where: str, shape: tuple[int, int]) -> ScaledImage:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return ScaledImage(image, image.size, decode_image(data, where, shape).edges, shape)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.loader", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of the data")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--tiny", action="store_true", help="trial run; writes to the scratch folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
