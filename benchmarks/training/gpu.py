"""`make bench-gpu`: the paper's network on one CUDA GPU: training, sampling, and embedding by ViT-L/14.

Steps of the 1.3B model at 256, 512 and 768 px by the trainer's own engine, with activation checkpointing on
and off, compiled and not, by attention backend; samples at 768 px. Writes `docs/gpu.json` and
`docs/gpu.md`. `--tiny` runs every case with a tiny network, on a CPU too, and writes to the scratch.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.report import DOCS, REPOSITORY, SCRATCH, markdown_table, write_report
from benchmarks.training.gpu_cases import BACKENDS, Case, leave, run, words
from jobs.reporting.hardware import hardware

SIZES = (256, 512, 768)
CASE_S = 1800
"""Longest that a case may take, compilation included."""
AIM = 0.5

PAGE = """# On a GPU

Written by `make bench-gpu`; the numbers are in `gpu.json`. Each case ran in a process of its own.

**Machine:** {device}; {hardware}; torch {torch}. A bf16 matrix product reached {tera:,.0f} TFLOP/s, which is
what MFU is counted against: operations of the UNet, forward and backward, once.

## Training

A step of LAION-RDM on one rank: DeepSpeed ZeRO 1 in bf16 with fp32 master weights, latents in memory,
k = 8, without averaged weights (5.3 GB more). The batch is the fastest of those that fit; on eight ranks each
holds an eighth of the optimizer's 16 GB.

{training}

{aim}

## Attention at 256 px

{attention}

## Sampling at 768 px

Guidance 5, 20 tokens, the UNet in bf16, decoded by the KL autoencoder in fp32.

{sampling}

## Embedding

ViT-L/14, bf16, images at hand as tensors: {embedding}.
"""


def cases(tiny: bool) -> Iterator[tuple[str, Case]]:
    """Every case, by the part of the page that it belongs to."""
    yield "matmul", Case("matmul", tiny=tiny)
    for size in (32,) if tiny else SIZES:
        for checkpointing in (False, True):
            yield "training", Case("train", size, checkpointing=checkpointing, tiny=tiny)
        if not tiny:
            yield "training", Case("train", size, compile=True)
    for backend in ("math",) if tiny else BACKENDS:
        yield (
            "attention",
            Case("train", 32 if tiny else 256, batch=2 if tiny else 32, backend=backend, tiny=tiny),
        )
    for scheduler, steps in (("ddim", 2), ("dpm++", 2)) if tiny else (("ddim", 50), ("dpm++", 20)):
        for compiled in (False,) if tiny else (False, True):
            yield (
                "sampling",
                Case(
                    "sample",
                    32 if tiny else 768,
                    batch=1 if tiny else 8,
                    compile=compiled,
                    scheduler=scheduler,
                    steps=steps,
                    tiny=tiny,
                ),
            )
    yield "embedding", Case("embed", 32 if tiny else 224, batch=2 if tiny else 256, tiny=tiny)


def measure(case: Case) -> dict[str, Any]:
    """What a case gives; where it fails, the last line of why. A tiny case needs no process of its own."""
    if case.tiny:
        return run(case)
    command = [sys.executable, "-m", "benchmarks.training.gpu_cases", words(case)]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=CASE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {CASE_S} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    (card,) = (found for _, found in result["matmul"])
    peak = card["flops_per_s"]
    heads = ["px", "checkpointing", "compiled", "batch:", "largest:", "images/s:", "MFU:", "GiB:"]
    training = [
        [str(case["size"]), _yes(case["checkpointing"]), _yes(case["compile"]), *_training_cells(found, peak)]
        for case, found in result["training"]
    ]
    attention = [
        [case["backend"], f"{found['images_per_s']:,.1f}" if "failed" not in found else found["failed"]]
        for case, found in result["attention"]
    ]
    sampling = [
        [
            f"{case['scheduler']}, {case['steps']} steps",
            _yes(case["compile"]),
            str(case["batch"]),
            *_cells(found),
        ]
        for case, found in result["sampling"]
    ]
    ((_, embedding),) = result["embedding"]
    return PAGE.format(
        device=card["device"],
        hardware=result["hardware"],
        torch=card["torch"],
        tera=peak / 1e12,
        training=markdown_table(heads, training),
        aim=_aim(result["training"], peak),
        attention=markdown_table(["backend", "images/s:"], attention),
        sampling=markdown_table(["", "compiled", "batch:", "images/s:", "GiB:"], sampling),
        embedding=embedding.get("failed") or f"{embedding['images_per_s']:,.0f} images/s",
    )


def _training_cells(found: dict[str, Any], peak: float) -> list[str]:
    if "failed" in found:
        return ["", "", found["failed"], "", ""]
    mfu = found["images_per_s"] * found["flops"] / peak
    cells = [str(found["batch"]), str(found["largest_batch"]), f"{found['images_per_s']:,.1f}"]
    return [*cells, f"{mfu:.1%}", f"{found['memory_gib']:.1f}"]


def _cells(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [found["failed"], ""]
    return [f"{found['images_per_s']:,.3f}", f"{found['memory_gib']:.1f}"]


def _aim(training: list[tuple[dict[str, Any], dict[str, Any]]], peak: float) -> str:
    first = min(case["size"] for case, _ in training)
    found = [one for case, one in training if case["size"] == first and "failed" not in one]
    if not found:
        return f"No case at {first} px gave a number."
    best = max(one["images_per_s"] * one["flops"] / peak for one in found)
    verdict = "reached" if best >= AIM else "missed"
    return f"Aim: {AIM:.0%} MFU at {first} px; best {best:.1%}: {verdict}."


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    """Measure every case and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.gpu", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where a tiny run writes")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    parser.add_argument("--tiny", action="store_true", help="every case with a tiny network, on a CPU too")
    options = parser.parse_args()
    result: dict[str, Any] = {"hardware": hardware(), "matmul": [], "training": [], "attention": []}
    result |= {"sampling": [], "embedding": []}
    for part, case in cases(options.tiny):
        found = measure(case)
        print(part, words(case), json.dumps(found), flush=True)
        result[part].append((vars(case), found))
    leave()
    write_report(options.scratch if options.tiny else options.docs, "gpu", result, page(result))


if __name__ == "__main__":
    main()
