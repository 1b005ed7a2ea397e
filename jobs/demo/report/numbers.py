"""The demo's numbers and the goals they are held to.

Reads what the stages left below the root and gives the flat values of `report.json`. Whatever can be
counted again is counted again (`jobs.demo.report.audit`); only the style accuracies are the evaluation's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from jobs.cli.recipe import Recipe
from jobs.demo.report.audit import NeighborTables, download_urls_without_status, filter_rows_unaccounted
from pipeline.recipe import FilterConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.recipe import TrainConfig

STYLE_NUMBERS = (
    "num_styles",
    "style_classifier_accuracy",
    "style_accuracy_retrieval",
    "style_accuracy_suffix",
    "style_accuracy_suffix_retrieval",
    "style_accuracy_no_neighbors",
)
DATA_STAGES = ("filter", "download", "embed", "index", "neighbors", "latents")
ROAD = ("world", "clip", "autoencoder", *DATA_STAGES, "databases", "train", "sample", "evaluate")
PICTURES_AT_ONCE = 64
ABOUT_CHANCE = 1.5
"""Accuracies up to this many times chance are told apart from chance by no run of a demo's size."""


@dataclass(frozen=True)
class Demo:
    """Where a demo stands: its root, its world and metadata, and the settings that the numbers need."""

    root: Root
    world: Root
    metadata: Root
    clip: ClipConfig
    neighbors: NeighborsConfig
    name: str
    """The run's folder below `runs/`."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Demo":
        """The demo that a recipe describes; its world stands at `<root>/world`."""
        return cls(
            root=recipe.root,
            world=recipe.root.child("world"),
            metadata=Root(recipe[FilterConfig].metadata),
            clip=recipe[ClipConfig],
            neighbors=recipe[NeighborsConfig],
            name=recipe[TrainConfig].name,
        )


@dataclass(frozen=True)
class Goal:
    """One number with what was wanted of it."""

    name: str
    about: str
    value: int | float
    wanted: str
    met: bool


def measure(demo: Demo) -> dict[str, Any]:
    """Every number of the report, flat, by the names of `report.json`; `seconds` is an object.

    Raises UserError where a stage did not finish.
    """
    recalls = text_recall(demo, (1, 5, 10))
    tables = NeighborTables(demo.root, demo.world, demo.neighbors)
    evaluation = demo.root.read_json(f"runs/{demo.name}/evaluate/evaluation.json")
    return {
        "filter_rows_unaccounted": filter_rows_unaccounted(demo.root, demo.metadata),
        "download_urls_without_status": download_urls_without_status(demo.root),
        **{f"text_recall_at_{k}": recall for k, recall in recalls.items()},
        f"neighbor_recall_at_{demo.neighbors.k}": tables.recall(),
        "neighbor_leaks": tables.leaks(),
        **{name: evaluation[name] for name in STYLE_NUMBERS},
        **interval_ends(evaluation),
        "seconds": seconds(demo),
    }


def interval_ends(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Which ends of two 95 % intervals must not meet: with neighbors the lower, without them the upper."""
    modes = evaluation["modes"]
    return {
        "style_accuracy_retrieval_low": modes["retrieval"]["accuracy_interval"][0],
        "style_accuracy_no_neighbors_high": modes["no_neighbors"]["accuracy_interval"][1],
    }


def goals(numbers: Mapping[str, Any]) -> list[Goal]:
    """What the demo must reach, in the order of the road. numbers: from `measure`."""
    chance = 1 / numbers["num_styles"]
    recall = next(name for name in numbers if name.startswith("neighbor_recall_at_"))

    def goal(name: str, about: str, wanted: str, met: bool) -> Goal:
        return Goal(name, about, numbers[name], wanted, met)

    def nothing(name: str, about: str) -> Goal:
        return goal(name, about, "0", numbers[name] == 0)

    def at_least(name: str, about: str, least: float) -> Goal:
        return goal(name, about, f"≥ {least:g}", numbers[name] >= least)

    ours, baseline = "style_accuracy_retrieval", numbers["style_accuracy_suffix"]
    withheld = "style_accuracy_no_neighbors"
    low, high = "style_accuracy_retrieval_low", numbers["style_accuracy_no_neighbors_high"]
    return [
        nothing("filter_rows_unaccounted", "Metadata rows neither kept nor dropped with a reason"),
        nothing("download_urls_without_status", "Selected URLs without exactly one true status"),
        at_least("text_recall_at_10", "Text-to-image recall@10 on held-out captions", 0.95),
        at_least(recall, "Neighbor table against brute force, recall@" + recall.rsplit("_", 1)[-1], 0.95),
        nothing("neighbor_leaks", "Neighbors that are the image, a training image or a copy"),
        at_least("num_styles", "Styles, each with its own database", 10),
        at_least("style_classifier_accuracy", "Judge of styles on pictures it never saw", 0.9),
        at_least(ours, "Samples taken for their database's style: 5 × chance", 5 * chance),
        goal(ours, "The same, above naming the style", f"> {baseline:.3f}", numbers[ours] > baseline),
        goal(
            withheld,
            "The same prompts, neighbors withheld: about chance",
            f"≤ {ABOUT_CHANCE * chance:g}",
            numbers[withheld] <= ABOUT_CHANCE * chance,
        ),
        goal(
            low,
            "Lower end of the 95% interval with neighbors, above the upper end without",
            f"> {high:.3f}",
            numbers[low] > high,
        ),
    ]


def goal_lines(found: Sequence[Goal]) -> str:
    """The goals as a table for a terminal."""
    rows = [("goal", "measured", "wanted", "")]
    rows += [
        (
            goal.about,
            f"{goal.value:,}" if isinstance(goal.value, int) else f"{goal.value:.4f}",
            goal.wanted,
            "met" if goal.met else "MISSED",
        )
        for goal in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    )


def text_recall(demo: Demo, ks: Sequence[int]) -> dict[int, float]:
    """Share of held-out captions whose own picture is among the k most similar of the whole gallery.

    A picture that ties with others is ranked behind them, so an encoder that tells nothing apart scores 0.
    """
    with demo.world.open("held_out.parquet") as file:
        gallery = pq.read_table(file, columns=["path", "caption"]).to_pydict()
    if not gallery["path"]:
        raise UserError(f"{demo.world.at('held_out.parquet')} has no pictures. Set world.num_held_out.")
    encoder = Encoder(demo.clip)
    paths = gallery["path"]
    pictures = [
        encoder.encode_images([_open(demo.world, path) for path in paths[i : i + PICTURES_AT_ONCE]])
        for i in range(0, len(paths), PICTURES_AT_ONCE)
    ]
    return recall_at(encoder.encode_texts(gallery["caption"]), np.concatenate(pictures), ks)


def recall_at(texts: Any, pictures: Any, ks: Sequence[int]) -> dict[int, float]:
    """Recall of row i of `pictures` for row i of `texts`, both (n, dim) unit rows, by k.

    Whatever is not smaller, ties and NaN too, ranks before it.
    """
    products = texts @ pictures.T
    ranks = (~(products < np.diag(products)[:, None])).sum(axis=1)
    return {k: float(np.mean(ranks <= k)) for k in ks}


def seconds(demo: Demo) -> dict[str, float]:
    """Wall seconds by step, in the order of the road.

    What `seconds.json` says a step took when it did work; without that file, what the manifests say.
    """
    if demo.root.exists("seconds.json"):
        found = {step: float(took) for step, took in demo.root.read_json("seconds.json").items()}
    else:
        found = {
            step: read_manifest(demo.root, folder).seconds
            for step in ROAD
            for folder in (step, f"runs/{demo.name}/{step}")
            if demo.root.exists(f"{folder}/manifest.json")
        }
    return {step: found[step] for step in sorted(found, key=_place)}


def _place(step: str) -> tuple[int, str]:
    return (ROAD.index(step) if step in ROAD else len(ROAD), step)


def _open(root: Root, name: str) -> Image.Image:
    with root.open(name) as file, Image.open(file) as picture:
        return picture.convert("RGB")
