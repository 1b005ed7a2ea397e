"""`python -m jobs.status RECIPE`: how far each stage of a recipe is, from what stands on disk alone.

Reads manifests, completion records and the metrics of training; writes nothing, needs no Ray and loads none
of the libraries that stages need. `--json` for machines, `--watch SECONDS` to look again and again.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.cli.command import exit_on_user_error, recipe_parser
from jobs.cli.recipe import Recipe, load_recipe
from jobs.status.training_progress import of_training
from pipeline.runtime.status import (
    StageSpec,
    Status,
    UpstreamStages,
    find_manifest,
    format_duration,
    stage_status,
)
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.recipe import LatentsConfig, TrainConfig, TrainingRecipe

DATA = ("filter", "download", "embed", "index", "neighbors", "latents")
OF_A_RUN = ("train", "sample", "evaluate")
WIDTH = 110
REASONS = 5
"""Reasons that the table names."""


def statuses(recipe: Recipe, now: float) -> list[Status]:
    """The state of every stage that the recipe has, in order. now: seconds since 1970.

    Raises UserError if the recipe's root is not there.
    """
    root = recipe.root
    if not root.exists(""):
        raise UserError(
            f"{root.url} is not there: nothing was run with {recipe.path} yet, or elsewhere. "
            f"Begin with 'make filter RECIPE={recipe.path}', or name the folder: --set root=..."
        )
    known: UpstreamStages = {}
    found = []
    for name in (*DATA, *OF_A_RUN):
        if not recipe.has(name) or (name in OF_A_RUN and not recipe.has("train")):
            continue
        wanted = _wanted(recipe, name, known)
        manifest = find_manifest(root, wanted.folder)
        status = stage_status(root, wanted, manifest, known, now)
        if name == "train":
            status = of_training(root, wanted.folder, status, (recipe[TrainConfig], now))
        found.append(status)
        known[wanted.name] = status, manifest
        if name == "index":
            known["database/index"] = known[name]  # as sample and evaluate call it
    return found


def _wanted(recipe: Recipe, name: str, known: UpstreamStages) -> StageSpec:
    """What the recipe asks of a stage, and how many shards the manifests before it make it."""
    config = recipe.sections[name]
    if name in OF_A_RUN:
        folder = f"runs/{recipe[TrainConfig].name}/{name}"
        return StageSpec(name, folder, _training(recipe) if name == "train" else config)
    folder = f"latents/{recipe[LatentsConfig].size}" if name == "latents" else name
    return StageSpec(folder, folder, config, _totals(recipe.root, name, known))


def _training(recipe: Recipe) -> Config | None:
    """The sections that training is made of, as it fingerprints them."""
    names = ("model", "diffusion", "autoencoder", "train")
    if not all(recipe.has(name) for name in names):
        return None
    sections: dict[str, Any] = {name: recipe.sections[name] for name in names}
    return TrainingRecipe.model_construct(**sections, clip=None)


def _totals(root: Root, name: str, known: UpstreamStages) -> dict[str, int]:
    """Shards to make by phase, as far as what stands upstream tells."""
    upstream = {"download": "filter", "embed": "download", "latents": "embed", "neighbors": "index"}
    if name == "index":
        return {"centroids": 1, "calibration": 1, **_partitions(root)}
    _, manifest = known.get(upstream.get(name, ""), (None, None))
    if manifest is None:
        return {}
    if name == "neighbors":
        partitions = len(manifest.values["rows"])
        return {"match": partitions, "recall": partitions + 2}
    splits = ("train/",) if name == "latents" else ("train/", "database/")
    return {"": sum(len(manifest.shard_names(split)) for split in splits)}


def _partitions(root: Root) -> dict[str, int]:
    """As many as the centroids that an unfinished index has written already."""
    if not root.exists("index/centroids.npy"):
        return {}
    with root.open("index/centroids.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return {"partitions": shape[0]}


def table(found: Sequence[Status]) -> str:
    """The states for a person, at most WIDTH columns."""
    heads = ["stage", "state", "done", "rows", "rows/s", "on disk", "left"]
    lines = [_line(heads)]
    for one in found:
        about = "~" if one.is_estimate else ""
        cells = [
            one.stage,
            one.state,
            _done(one),
            f"{about}{one.rows:,}" if one.rows else "",
            f"{one.rows_per_s:,.1f}" if one.rows_per_s else "",
            f"{about}{_size(one.bytes)}" if one.bytes else "",
            format_duration(one.eta_s) if one.eta_s is not None else "",
        ]
        lines.append(_line(cells))
        for more in (one.note, _reasons(one)):
            lines += textwrap.wrap(more, WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 15)
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    stage, state, done, *numbers = cells
    widths = (16, 14, 11, 14)
    right = "".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=True))
    return f"{stage:<13}{state:<13}{done:<28}{right}".rstrip()


def _done(one: Status) -> str:
    if one.state == "not started":
        return ""
    total = "?" if one.total is None else f"{one.total:,}"
    return f"{one.phase or one.unit} {one.done:,}/{total}"


def _reasons(one: Status) -> str:
    """The reasons of most rows, with their share of all rows seen."""
    if not one.reasons:
        return ""
    lost = sum(one.reasons.values())
    named = [f"{word} {count:,}" for word, count in list(one.reasons.items())[:REASONS]]
    more = len(one.reasons) - len(named)
    named += [f"{more} more reasons"] if more > 0 else []
    return f"not kept {lost:,} ({lost / (one.rows + lost):.1%}): {', '.join(named)}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def show(recipe: Recipe, as_json: bool) -> str:
    """What the command prints."""
    now = time.time()
    found = statuses(recipe, now)
    if as_json:
        plain: dict[str, Any] = {
            "root": recipe.root.url,
            "time": now,
            "stages": [asdict(one) for one in found],
        }
        return json.dumps(plain)
    return f"{recipe.root.url}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}\n\n{table(found)}"


def run(arguments: argparse.Namespace) -> None:
    """Look once, or until interrupted."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        print(json.dumps(recipe.resolved(), indent=2))
        return
    while True:
        text = show(recipe, arguments.json)
        clear = "\x1b[2J\x1b[H" if arguments.watch and not arguments.json else ""
        print(f"{clear}{text}", flush=True)
        if not arguments.watch:
            return
        time.sleep(arguments.watch)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    made = recipe_parser("status", __doc__ or "")
    made.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    made.add_argument("--watch", type=float, metavar="SECONDS", help="look again after so many seconds")
    arguments = made.parse_args(argv)
    try:
        exit_on_user_error(lambda: run(arguments))
    except KeyboardInterrupt:  # how a watch ends
        print()


if __name__ == "__main__":
    main()
