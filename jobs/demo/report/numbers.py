"""The numbers of the demo's report (the values of `report.json`), and their goals.

Everything is measured again from the outputs of the stages, except the style accuracies of the evaluation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from jobs.cli.recipe import Recipe
from jobs.demo.report.audit import NeighborTables, download_urls_without_status, filter_rows_unaccounted
from jobs.reporting.estimates import estimate_text
from pipeline.recipe import FilterConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.intervals import wilson_interval
from trainer.evaluation.scores import completed
from trainer.evaluation.styles import BASELINES
from trainer.recipe import TrainConfig

DATA_STAGES = ("filter", "download", "embed", "index", "neighbors", "latents")
STEPS = ("world", "clip", "autoencoder", *DATA_STAGES, "databases", "train", "sample", "evaluate", "judge")
BATCH_SIZE = 64
ABOUT_CHANCE = 1.5
"""Accuracies up to this multiple of chance count as chance."""
CONTENT_GOALS = {"shape": 0.85, "count": 0.85, "color": 0.95, "background": 0.85, "layout": 0.85, "style": 0.95}
"""Wanted shares of samples with the requested attribute, by the judge of contents. A miss ends no command: the
model of the demo is small."""


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

    def evaluation(self) -> dict[str, Any]:
        """The stored results of the evaluation."""
        return completed(self.root.read_json(f"runs/{self.name}/evaluate/evaluation.json"))


@dataclass(frozen=True)
class Goal:
    """A number with its 95 % interval if it is an estimate, and the value wanted as text.

    An estimate misses a goal only if its interval excludes the wanted values.
    """

    name: str
    about: str
    value: int | float
    interval: tuple[float, float] | None
    wanted: str
    met: bool
    is_required: bool = True
    """Whether a miss ends the command with code 1."""

    @property
    def measured(self) -> str:
        """The number as text."""
        if self.interval:
            return estimate_text((self.value, *self.interval))
        return f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:.3f}"


def measure(demo: Demo) -> dict[str, Any]:
    """Every number of the report, with the keys of `report.json`. Raises UserError for an unfinished stage."""
    recalls, captions = text_recall(demo, (1, 5, 10)), len(held_out_gallery(demo)["caption"])
    tables = NeighborTables(demo.root, demo.world, demo.neighbors)
    evaluation = demo.evaluation()
    return {
        "filter_rows_unaccounted": filter_rows_unaccounted(demo.root, demo.metadata),
        "download_urls_without_status": download_urls_without_status(demo.root),
        **{f"text_recall_at_{k}": recall for k, recall in recalls.items()},
        **_ends("text_recall_at_10", wilson_interval(recalls[10], captions)),
        f"neighbor_recall_at_{demo.neighbors.k}": tables.recall(),
        "neighbor_leaks": tables.leaks(),
        **style_numbers(evaluation),
        **content_numbers(read_manifest(demo.root, "judge").values["links"]),
        "seconds": seconds(demo),
    }


def style_numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies by all judges and gains of retrieval over the other modes, each with the ends of its interval."""
    judges, modes = evaluation["judges"], evaluation["modes"]
    estimates = {
        "style_classifier_accuracy": judges["clip"]["accuracy"],
        **{f"style_accuracy_{mode}": row["accuracy"] for mode, row in modes.items()},
        **{f"style_gain_over_{mode}": gain for mode, gain in evaluation["effect"].items()},
    }
    if judges["pixels"]:
        estimates["pixel_classifier_accuracy"] = judges["pixels"]["accuracy"]
        estimates |= {f"style_accuracy_pixels_{mode}": row["accuracy_pixels"] for mode, row in modes.items()}
        estimates |= {f"style_gain_pixels_over_{mode}": gain for mode, gain in evaluation["effect_pixels"].items()}
    if judges["descriptor"]:
        estimates["style_descriptor_retrieval"] = judges["descriptor"]["retrieval"]
        estimates |= {f"style_accuracy_nearest_{mode}": row["accuracy_nearest"] for mode, row in modes.items()}
    numbers: dict[str, Any] = {"num_styles": evaluation["num_styles"]}
    for name, (value, low, high) in estimates.items():
        numbers |= {name: value, **_ends(name, (low, high))}
    return numbers


def _ends(name: str, interval: Sequence[float]) -> dict[str, float]:
    """The ends of a number's interval, under their keys in `report.json`."""
    return dict(zip((f"{name}_low", f"{name}_high"), interval, strict=True))


def content_numbers(links: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Shares of samples with each requested attribute, and the judge's accuracy at its worst attribute.

    links: estimates by link and attribute, as the step `judge` stores them.
    """
    estimates = {"judge_accuracy": min(links["real"].values(), key=lambda estimate: estimate[0]), **links["samples"]}
    numbers: dict[str, Any] = {}
    for name, (value, *interval) in estimates.items():
        numbers |= {f"content_{name}": value} | _ends(f"content_{name}", interval)
    return numbers


def goals(numbers: Mapping[str, Any]) -> list[Goal]:
    """The goals of the demo, in the order of the steps. numbers: from `measure`."""
    chance = 1 / numbers["num_styles"]
    recall = next(name for name in numbers if name.startswith("neighbor_recall_at_"))
    goal = partial(_goal, numbers)
    judged = [("", "style classifier on CLIP features"), ("pixels_", "style classifier on pixels")]
    if "pixel_classifier_accuracy" not in numbers:
        judged = judged[:1]
    demo_goals = [
        goal("filter_rows_unaccounted", "Metadata rows neither kept nor dropped with a reason", 0, 0),
        goal("download_urls_without_status", "Selected URLs without exactly one correct status", 0, 0),
        goal("text_recall_at_10", "Text-to-image recall@10 on held-out captions", 0.95),
        goal(recall, f"Neighbor table against brute force, {recall[9:].replace('_at_', '@')}", 0.95),
        goal("neighbor_leaks", "Neighbors that are the image itself, a training image or a copy", 0, 0),
        goal("num_styles", "Styles, each with its own database", 10),
    ]
    for infix, judge in judged:
        accuracy, name = f"style_accuracy_{infix}", "pixel_classifier" if infix else "style_classifier"
        demo_goals += [
            goal(f"{name}_accuracy", f"Accuracy of the {judge} on test pictures", 0.9),
            goal(f"{accuracy}retrieval", f"Samples in their database's style, by the {judge}: 5 × chance", 5 * chance),
            goal(f"{accuracy}no_neighbors", f"Without neighbors, by the {judge}: chance", most=ABOUT_CHANCE * chance),
            *(
                goal(f"style_gain_{infix}over_{mode}", f"Retrieval is not below {words}, by the {judge}", 0)
                for mode, words in BASELINES.items()
            ),
        ]
    if "style_descriptor_retrieval" in numbers:
        about = "Style descriptor: test pictures whose nearest picture has their style (mAP@1)"
        demo_goals.append(goal("style_descriptor_retrieval", about, 0.95))
    return [*demo_goals, *_content_goals(goal)]


def _content_goals(goal: Callable[..., Goal]) -> list[Goal]:
    """The goals of the judge of contents."""
    judge = "Judge of contents on real held-out pictures, at its worst attribute"
    text = "By the judge of contents (a miss is no error): samples with the"
    return [
        goal("content_judge_accuracy", judge, 0.97),
        *(
            replace(goal(f"content_{name}", f"{text} {name} that was asked for", least), is_required=False)
            for name, least in CONTENT_GOALS.items()
        ),
    ]


def _goal(numbers: Mapping[str, Any], name: str, about: str, least: float = -np.inf, most: float = np.inf) -> Goal:
    value = numbers[name]
    low, high = ends = numbers.get(f"{name}_low", value), numbers.get(f"{name}_high", value)
    wanted = f"{least:g}" if least == most else f"≤ {most:g}" if least == -np.inf else f"≥ {least:g}"
    interval = ends if f"{name}_low" in numbers else None
    return Goal(name, about, value, interval, wanted, high >= least and low <= most)


def goal_lines(demo_goals: Sequence[Goal]) -> str:
    """The goals as a text table."""
    rows = [("goal", "measured", "wanted", "")]
    rows += [(goal.about, goal.measured, goal.wanted, "met" if goal.met else "MISSED") for goal in demo_goals]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def text_recall(demo: Demo, ks: Sequence[int]) -> dict[int, float]:
    """Share of held-out captions with their own picture among the k most similar of all held-out pictures.

    Ties rank before the own picture, so an encoder that gives equal vectors to all pictures scores 0.
    """
    gallery = held_out_gallery(demo)
    encoder = Encoder(demo.clip)
    paths = gallery["path"]
    pictures = [
        encoder.encode_images([open_picture(demo.world, path) for path in paths[i : i + BATCH_SIZE]])
        for i in range(0, len(paths), BATCH_SIZE)
    ]
    return recall_at(encoder.encode_texts(gallery["caption"]), np.concatenate(pictures), ks)


def held_out_gallery(demo: Demo) -> dict[str, list[str]]:
    """Paths and captions of the held-out pictures. Raises UserError if there are none."""
    with demo.world.open("held_out.parquet") as file:
        gallery: dict[str, list[str]] = pq.read_table(file, columns=["path", "caption"]).to_pydict()
    if not gallery["path"]:
        raise UserError(f"{demo.world.at('held_out.parquet')} lists no pictures. Set world.num_held_out to 1 or more.")
    return gallery


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
