"""`make bench-gpu`: training, sampling and embedding with the paper's networks on one CUDA GPU.

Training steps of the 1.3B model at 256, 512 and 768 px with the trainer's engine, with and without activation
checkpointing, compilation and each attention backend; sampling at 768 px; embedding with ViT-L/14. Writes
`docs/gpu.json` and `docs/gpu.md`. `--tiny` runs every case with a tiny network, also on a CPU, and writes to
the scratch folder.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.report import DOCS, REPOSITORY, SCRATCH, markdown_table, write_report
from benchmarks.training.gpu_cases import BACKENDS, Case, case_as_json, leave_process_group, run
from jobs.reporting.hardware import hardware
from trainer.tracking.flops import known_peak

SIZES = (256, 512, 768)
CASE_S = 1800
"""Timeout of a case, compilation included."""
MFU_GOAL = 0.5
"""Model FLOPs utilization, as in training (trainer.tracking.flops)."""

PAGE = """# Speed on a GPU

Written by `make bench-gpu`; the numbers are in `gpu.json`. Each case ran in a separate process.

**Machine:** {device}; {hardware}; torch {torch}. A bf16 matrix product reached {tera:,.0f} TFLOP/s; the data sheet
says {sheet}. MFU is the rate of operations of the UNet, forward and backward without recomputation, divided by the rate
of the data sheet; "of product" is the same divided by the rate of the matrix product.

## Training

A training step of LAION-RDM on one rank: DeepSpeed ZeRO 1 in bf16 with fp32 master weights, latents in
memory, k = 8, without averaged weights (5.3 GB more). The batch size is the fastest that fits; on eight
ranks each rank stores an eighth of the 16 GB of optimizer state.

{training}

{goal}

## Attention at 256 px

{attention}

## Sampling at 768 px

Guidance 5, 20 context tokens, the UNet in bf16, decoding by the KL autoencoder in fp32.

{sampling}

## Embedding

ViT-L/14, bf16, images as tensors in memory: {embedding}.
"""


def cases(tiny: bool) -> Iterator[tuple[str, Case]]:
    """All cases, with their sections of the page."""
    yield "matmul", Case("matmul", tiny=tiny)
    for size in (32,) if tiny else SIZES:
        for checkpointing in (False, True):
            yield "training", Case("train", size, checkpointing=checkpointing, tiny=tiny)
        if not tiny:
            yield "training", Case("train", size, compile=True)
    for backend in ("math",) if tiny else BACKENDS:
        yield "attention", Case("train", 32 if tiny else 256, 2 if tiny else 32, backend=backend, tiny=tiny)
    size, batch = (32, 1) if tiny else (768, 8)
    for scheduler, steps in (("ddim", 2), ("dpm++", 2)) if tiny else (("ddim", 50), ("dpm++", 20)):
        for compiled in (False,) if tiny else (False, True):
            case = Case("sample", size, batch, compile=compiled, scheduler=scheduler, steps=steps, tiny=tiny)
            yield "sampling", case
    yield "embedding", Case("embed", 32 if tiny else 224, batch=2 if tiny else 256, tiny=tiny)


def measure(case: Case) -> dict[str, Any]:
    """The result of a case, or the last line of its error. Tiny cases run in this process."""
    if case.tiny:
        return run(case)
    command = [sys.executable, "-m", "benchmarks.training.gpu_cases", case_as_json(case)]
    try:
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=CASE_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {CASE_S} s"}
    if process.returncode:
        return {"failed": (process.stderr.strip().splitlines() or ["no error message"])[-1][:200]}
    return dict(json.loads(process.stdout.strip().splitlines()[-1]))


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    ((_, gpu),) = result["matmul"]
    rates = {"MFU": known_peak(gpu["device"]), "product": gpu["flops_per_s"]}
    headings = ["px", "checkpointing", "compiled", "batch:", "largest:", "images/s:", "MFU:", "of product:", "GiB:"]
    training = [
        [str(case["size"]), _yes(case["checkpointing"]), _yes(case["compile"]), *_training_cells(values, rates)]
        for case, values in result["training"]
    ]
    attention = [
        [case["backend"], values.get("failed") or f"{values['images_per_s']:,.1f}"]
        for case, values in result["attention"]
    ]
    sampling = [
        [
            f"{case['scheduler']}, {case['steps']} steps",
            _yes(case["compile"]),
            str(case["batch"]),
            *_sampling_cells(values),
        ]
        for case, values in result["sampling"]
    ]
    ((_, embedding),) = result["embedding"]
    return PAGE.format(
        device=gpu["device"],
        hardware=result["hardware"],
        torch=gpu["torch"],
        tera=gpu["flops_per_s"] / 1e12,
        sheet=f"{rates['MFU'] / 1e12:,.0f} TFLOP/s"
        if rates["MFU"]
        else "nothing about this device, so there is no MFU",
        training=markdown_table(headings, training),
        goal=_goal_text(result["training"], rates["MFU"]),
        attention=markdown_table(["backend", "images/s:"], attention),
        sampling=markdown_table(["", "compiled", "batch:", "images/s:", "GiB:"], sampling),
        embedding=embedding.get("failed") or f"{embedding['images_per_s']:,.0f} images/s",
    )


def _training_cells(values: dict[str, Any], rates: dict[str, float | None]) -> list[str]:
    if "failed" in values:
        return ["", "", values["failed"], "", "", ""]
    shares = [f"{values['images_per_s'] * values['flops'] / rate:.1%}" if rate else "" for rate in rates.values()]
    cells = [str(values["batch"]), str(values["largest_batch"]), f"{values['images_per_s']:,.1f}"]
    return [*cells, *shares, f"{values['memory_gib']:.1f}"]


def _sampling_cells(values: dict[str, Any]) -> list[str]:
    if "failed" in values:
        return [values["failed"], ""]
    return [f"{values['images_per_s']:,.3f}", f"{values['memory_gib']:.1f}"]


def _goal_text(training: list[tuple[dict[str, Any], dict[str, Any]]], peak: float | None) -> str:
    size = min(case["size"] for case, _ in training)
    finished = [values for case, values in training if case["size"] == size and "failed" not in values]
    if not finished:
        return f"All cases at {size} px failed."
    if peak is None:
        return f"Goal: {MFU_GOAL:.0%} MFU at {size} px; not comparable on this device."
    best = max(values["images_per_s"] * values["flops"] / peak for values in finished)
    verdict = "reached" if best >= MFU_GOAL else "missed"
    return f"Goal: {MFU_GOAL:.0%} MFU at {size} px; best {best:.1%}: {verdict}."


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.gpu", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of the results with --tiny")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU")
    options = parser.parse_args()
    result: dict[str, Any] = {"hardware": hardware(), "matmul": [], "training": [], "attention": []}
    result |= {"sampling": [], "embedding": []}
    for part, case in cases(options.tiny):
        values = measure(case)
        print(part, case_as_json(case), json.dumps(values), flush=True)
        result[part].append((vars(case), values))
    leave_process_group()
    write_report(options.scratch if options.tiny else options.docs, "gpu", result, page(result))


if __name__ == "__main__":
    main()
