"""The numbers of the demo's report (the values of `report.json`), and their goals.

Everything is measured again from the outputs of the stages, except the style accuracies of the evaluation.
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
STEPS = ("world", "clip", "autoencoder", *DATA_STAGES, "databases", "train", "sample", "evaluate")
BATCH_SIZE = 64
ABOUT_CHANCE = 1.5
"""Accuracies up to this multiple of chance cannot be distinguished from chance at the demo's size."""


@dataclass(frozen=True)
class Demo:
    """The folders of a demo, and the settings that its numbers depend on."""

    root: Root
    world: Root
    metadata: Root
    clip: ClipConfig
    neighbors: NeighborsConfig
    name: str
    """The run's folder below `runs/`."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Demo":
        """The demo of a recipe. Its world is at `<root>/world`."""
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
    """A number, and the value wanted as text."""

    name: str
    about: str
    value: int | float
    wanted: str
    met: bool


def measure(demo: Demo) -> dict[str, Any]:
    """Every number of the report, with the keys of `report.json`. Raises UserError for an unfinished stage."""
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
    """Lower end of the 95 % interval with neighbors, and upper end of the one without."""
    modes = evaluation["modes"]
    return {
        "style_accuracy_retrieval_low": modes["retrieval"]["accuracy_interval"][0],
        "style_accuracy_no_neighbors_high": modes["no_neighbors"]["accuracy_interval"][1],
    }


def goals(numbers: Mapping[str, Any]) -> list[Goal]:
    """The goals of the demo, in the order of the steps. numbers: from `measure`."""
    chance = 1 / numbers["num_styles"]
    recall = next(name for name in numbers if name.startswith("neighbor_recall_at_"))
    accuracy = "style_accuracy_retrieval"

    def goal(name: str, about: str, wanted: str, met: bool) -> Goal:
        return Goal(name, about, numbers[name], wanted, met)

    def zero(name: str, about: str) -> Goal:
        return goal(name, about, "0", numbers[name] == 0)

    def at_least(name: str, about: str, least: float) -> Goal:
        return goal(name, about, f"≥ {least:g}", numbers[name] >= least)

    def at_most(name: str, about: str, most: float) -> Goal:
        return goal(name, about, f"≤ {most:g}", numbers[name] <= most)

    def above(name: str, about: str, bound: float) -> Goal:
        return goal(name, about, f"> {bound:.3f}", numbers[name] > bound)

    low_end = "Lower end of the 95% interval with neighbors, above the upper end without"
    return [
        zero("filter_rows_unaccounted", "Metadata rows neither kept nor dropped with a reason"),
        zero("download_urls_without_status", "Selected URLs without exactly one correct status"),
        at_least("text_recall_at_10", "Text-to-image recall@10 on held-out captions", 0.95),
        at_least(recall, f"Neighbor table against brute force, {recall[9:].replace('_at_', '@')}", 0.95),
        zero("neighbor_leaks", "Neighbors that are the image itself, a training image or a copy"),
        at_least("num_styles", "Styles, each with its own database", 10),
        at_least("style_classifier_accuracy", "Style classifier on test pictures, accuracy", 0.9),
        at_least(accuracy, "Samples classified as their database's style: 5 × chance", 5 * chance),
        above(accuracy, "The same, above naming the style in the prompt", numbers["style_accuracy_suffix"]),
        at_most("style_accuracy_no_neighbors", "Without neighbors: about chance", ABOUT_CHANCE * chance),
        above("style_accuracy_retrieval_low", low_end, numbers["style_accuracy_no_neighbors_high"]),
    ]


def goal_lines(demo_goals: Sequence[Goal]) -> str:
    """The goals as a text table."""
    rows = [("goal", "measured", "wanted", "")]
    rows += [
        (
            goal.about,
            f"{goal.value:,}" if isinstance(goal.value, int) else f"{goal.value:.4f}",
            goal.wanted,
            "met" if goal.met else "MISSED",
        )
        for goal in demo_goals
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def text_recall(demo: Demo, ks: Sequence[int]) -> dict[int, float]:
    """Share of held-out captions with their own picture among the k most similar of all held-out pictures.

    Ties rank before the own picture, so an encoder that gives equal vectors to all pictures scores 0.
    """
    with demo.world.open("held_out.parquet") as file:
        gallery = pq.read_table(file, columns=["path", "caption"]).to_pydict()
    if not gallery["path"]:
        raise UserError(f"{demo.world.at('held_out.parquet')} lists no pictures. Set world.num_held_out to 1 or more.")
    encoder = Encoder(demo.clip)
    paths = gallery["path"]
    pictures = [
        encoder.encode_images([open_picture(demo.world, path) for path in paths[i : i + BATCH_SIZE]])
        for i in range(0, len(paths), BATCH_SIZE)
    ]
    return recall_at(encoder.encode_texts(gallery["caption"]), np.concatenate(pictures), ks)


def recall_at(texts: Any, pictures: Any, ks: Sequence[int]) -> dict[int, float]:
    """Recall at each k of row i of `pictures` for row i of `texts`, (n, dim) unit rows. Ties and NaN rank before it."""
    products = texts @ pictures.T
    ranks = (~(products < np.diag(products)[:, None])).sum(axis=1)
    return {k: float(np.mean(ranks <= k)) for k in ks}


def seconds(demo: Demo) -> dict[str, float]:
    """Wall seconds of each step, in the order of the steps.

    From `seconds.json`, which skipped steps do not change; without that file from the manifests.
    """
    if demo.root.exists("seconds.json"):
        times = {step: float(value) for step, value in demo.root.read_json("seconds.json").items()}
    else:
        times = {
            step: read_manifest(demo.root, folder).seconds
            for step in STEPS
            for folder in (step, f"runs/{demo.name}/{step}")
            if demo.root.exists(f"{folder}/manifest.json")
        }
    return {step: times[step] for step in sorted(times, key=_order)}


def _order(step: str) -> tuple[int, str]:
    return (STEPS.index(step) if step in STEPS else len(STEPS), step)


def open_picture(root: Root, name: str) -> Image.Image:
    """A picture file below the root as RGB."""
    with root.open(name) as file, Image.open(file) as picture:
        return picture.convert("RGB")
