"""The demo's report: one HTML page with embedded pictures, and its numbers as JSON.

Reads the outputs of every stage; writes `<root>/report.html` and `<root>/report.json`. The page loads nothing
from the network. Captions and URLs are untrusted text, so the template escapes every value.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.demo.judge.labels import CLASSES
from jobs.demo.judge.links import LINKS
from jobs.demo.report import funnel
from jobs.demo.report import report_pictures as pictures
from jobs.demo.report.numbers import Demo, Goal, goals, measure
from jobs.reporting.charts import Bar, Curve, curve, duration, time_bars
from jobs.reporting.estimates import against_zero, estimate_text
from jobs.reporting.hardware import hardware
from jobs.reporting.judges import gallery_words
from jobs.reporting.page import render
from retrieval.storage.manifest import read_manifest
from trainer.evaluation.charts import LABELS
from trainer.evaluation.styles import BASELINES, stronger_baseline, style_words
from trainer.tracking.training_log import METRICS, read_step_metrics

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NUM_PROMPTS = 6
NUM_SAMPLES = 3
NUM_TRAINING_IMAGES = 4


@dataclass(frozen=True)
class WrittenReport:
    """Path of the written report, and its goals."""

    path: Path
    goals: tuple[Goal, ...]

    @property
    def all_met(self) -> bool:
        """True if no required goal is missed."""
        return all(goal.met for goal in self.goals if goal.is_required)


@dataclass(frozen=True)
class StyleBars:
    """The bars of one style: one for each mode, in the order of LABELS."""

    style: str
    bars: tuple[Bar, ...]


def write_report(demo: Demo) -> WrittenReport:
    """Measure everything and write the report. Raises UserError for an unfinished stage."""
    numbers = measure(demo)
    demo_goals = goals(numbers)
    demo.root.write_json("report.json", {**numbers, "goals": [asdict(goal) for goal in demo_goals]})
    filters: dict[str, Callable[..., str]] = {
        "estimate": estimate_text,
        "against_zero": against_zero,
        "gallery": gallery_words,
    }
    page = render(TEMPLATE, _content(demo, numbers, demo_goals), filters)
    demo.root.write_bytes("report.html", page.encode())
    return WrittenReport(demo.root.local_path("report.html"), tuple(demo_goals))


def _content(demo: Demo, numbers: dict[str, Any], demo_goals: list[Goal]) -> dict[str, Any]:
    evaluation = demo.evaluation()
    train = read_manifest(demo.root, f"runs/{demo.name}/train")
    evaluate = read_manifest(demo.root, f"runs/{demo.name}/evaluate")
    gallery = pictures.gallery(demo, NUM_PROMPTS)
    return {
        "numbers": numbers,
        "goals": demo_goals,
        "missed": sum(not goal.met for goal in demo_goals),
        "k": demo.neighbors.k,
        "near_copy_similarity": demo.neighbors.near_copy_similarity,
        "neighbors": read_manifest(demo.root, "neighbors").values,
        "gallery": gallery,
        "held_out": pictures.are_held_out(demo.world, [row.prompt for row in gallery]),
        "samples": pictures.samples(demo, NUM_SAMPLES),
        "training_images": pictures.training_images(demo, NUM_TRAINING_IMAGES),
        "modes": LABELS,
        "evaluation": evaluation,
        "baselines": BASELINES,
        **_stronger_baselines(evaluation),
        "evaluation_k": evaluate.config["k"],
        "style_bars": _style_bars(evaluation),
        "attributes": tuple(CLASSES),
        "links": {words: read_manifest(demo.root, "judge").values["links"][name] for name, words in LINKS.items()},
        "rows_read": funnel.num_rows(demo.metadata, ""),
        "steps": funnel.steps(demo.root),
        "statuses": funnel.statuses(demo.root),
        "loss": _loss(demo),
        "trained": train.values,
        "times": time_bars(numbers["seconds"]),
        "total_time": duration(sum(numbers["seconds"].values())),
        "hardware": hardware(),
    }


def _stronger_baselines(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The stronger baseline by each judge, and the gain of retrieval over it by this judge; None without a judge."""
    effects, by_pixels = evaluation["effect"], evaluation["effect_pixels"]
    baseline, baseline_pixels = stronger_baseline(effects), by_pixels and stronger_baseline(by_pixels)
    return {
        "baseline": baseline,
        "baseline_pixels": baseline_pixels,
        "gain": effects[baseline],
        "gain_pixels": by_pixels and by_pixels[baseline_pixels],
    }


def _style_bars(evaluation: dict[str, Any]) -> list[StyleBars]:
    def bar(row: dict[str, Any], mode: str) -> Bar:
        percent = 100 * row["modes"][mode]["accuracy"][0]
        return Bar(mode, percent, f"{percent:.3g}%")

    rows = evaluation["styles"]
    return [StyleBars(style_words(row["style"]), tuple(bar(row, mode) for mode in LABELS)) for row in rows]


def _loss(demo: Demo) -> Curve:
    points = read_step_metrics(demo.root.local_path(f"runs/{demo.name}/train/{METRICS}"))
    return curve([point.step for point in points], [point.loss for point in points])
