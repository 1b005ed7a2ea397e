"""The demo's report: one HTML page that carries its pictures inside, and the numbers as JSON.

Reads what every stage left; writes `<root>/report.html` and `<root>/report.json`. The page asks nothing
of the network. Captions and URLs are hostile text: the template escapes every value.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.cli.recipe import Recipe
from jobs.demo.report import funnel
from jobs.demo.report import report_pictures as sheets
from jobs.demo.report.numbers import Demo, Goal, goals, measure
from jobs.reporting.charts import Bar, Curve, curve, duration, time_bars
from jobs.reporting.hardware import hardware
from jobs.reporting.page import render
from retrieval.storage.manifest import read_manifest
from trainer.evaluation.charts import LABELS
from trainer.evaluation.styles import style_words
from trainer.tracking.training_log import METRICS, read_step_metrics

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PROMPTS = 6
PROMPT_SHEETS = 3
IMAGE_SHEETS = 4


@dataclass(frozen=True)
class Outcome:
    """The written report and how the goals fared."""

    path: Path
    goals: tuple[Goal, ...]

    @property
    def met(self) -> bool:
        """True if no goal was missed."""
        return all(goal.met for goal in self.goals)


@dataclass(frozen=True)
class StyleBars:
    """The bars of one style: one a mode, in the order of the modes."""

    style: str
    bars: tuple[Bar, ...]


def write_report(recipe: Recipe) -> Outcome:
    """Measure everything and write the report. Raises UserError where a stage did not finish."""
    return write_report_of(Demo.of(recipe))


def write_report_of(demo: Demo) -> Outcome:
    """The same for a demo by its parts."""
    numbers = measure(demo)
    found = goals(numbers)
    demo.root.write_json("report.json", {**numbers, "goals": [asdict(goal) for goal in found]})
    page = render(TEMPLATE, _content(demo, numbers, found))
    demo.root.write_bytes("report.html", page.encode())
    return Outcome(demo.root.local_path("report.html"), tuple(found))


def _content(demo: Demo, numbers: dict[str, Any], found: list[Goal]) -> dict[str, Any]:
    evaluation = demo.root.read_json(f"runs/{demo.name}/evaluate/evaluation.json")
    train = read_manifest(demo.root, f"runs/{demo.name}/train")
    evaluate = read_manifest(demo.root, f"runs/{demo.name}/evaluate")
    gallery = sheets.gallery(demo, PROMPTS)
    return {
        "numbers": numbers,
        "goals": found,
        "missed": sum(not goal.met for goal in found),
        "k": demo.neighbors.k,
        "near_copy_similarity": demo.neighbors.near_copy_similarity,
        "neighbors": read_manifest(demo.root, "neighbors").values,
        "gallery": gallery,
        "held_out": sheets.are_held_out(demo.world, [row.prompt for row in gallery]),
        "prompt_sheets": sheets.prompt_sheets(demo, PROMPT_SHEETS),
        "image_sheets": sheets.image_sheets(demo, IMAGE_SHEETS),
        "modes": LABELS,
        "evaluation": evaluation,
        "evaluation_k": evaluate.config["k"],
        "style_bars": _style_bars(evaluation),
        "rows_read": funnel.num_rows(demo.metadata, ""),
        "steps": funnel.steps(demo.root),
        "statuses": funnel.statuses(demo.root),
        "loss": _loss(demo),
        "trained": train.values,
        "times": time_bars(numbers["seconds"]),
        "total_time": duration(sum(numbers["seconds"].values())),
        "hardware": hardware(),
    }


def _style_bars(evaluation: dict[str, Any]) -> list[StyleBars]:
    return [
        StyleBars(
            style_words(row["style"]),
            tuple(
                Bar(
                    mode, 100 * row["modes"][mode]["accuracy"], f"{100 * row['modes'][mode]['accuracy']:.3g}%"
                )
                for mode in LABELS
            ),
        )
        for row in evaluation["styles"]
    ]


def _loss(demo: Demo) -> Curve:
    points = read_step_metrics(demo.root.local_path(f"runs/{demo.name}/train/{METRICS}"))
    return curve([point.step for point in points], [point.loss for point in points])
