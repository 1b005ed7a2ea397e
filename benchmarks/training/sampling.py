"""`make bench-sampling`: DPM-Solver++ at 20 steps beside DDIM and PLMS at 50, on a trained model.

Reads a recipe's finished run, its style databases and the prompts of its [evaluate]. Every method draws the
same requests from the same seeds; how far its pictures are from DDIM's is measured in CLIP space, next to
how far other seeds and five times the steps move them. Writes `docs/sampling.json` and `docs/sampling.md`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.common.report import DOCS, markdown_table, write_report
from jobs.cli.command import exit_on_user_error
from jobs.cli.recipe import Recipe, load_recipe
from jobs.reporting.hardware import hardware
from jobs.sample import trained_model
from retrieval.errors import UserError
from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.evaluate import style_names, train_style_classifier
from trainer.evaluation.metrics import wilson_interval
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.scores import SampleFeatures, score
from trainer.evaluation.styles import RETRIEVAL, make_style_groups
from trainer.recipe import SchedulerName
from trainer.sampling.request import Request, read_prompts
from trainer.sampling.sampler import Sampler

Features = npt.NDArray[np.float32]
OTHER_SEEDS = 1 << 31
"""Added to a seed, which the evaluation draws below it: another picture of the same request."""


@dataclass(frozen=True)
class Method:
    """A way to sample."""

    name: str
    scheduler: SchedulerName
    steps: int
    seed_offset: int = 0


REFERENCE = Method("DDIM, 50 steps", "ddim", 50)
METHODS = (
    REFERENCE,
    Method("DPM-Solver++, 20 steps", "dpm++", 20),
    Method("DDIM, 20 steps", "ddim", 20),
    Method("PLMS, 50 steps", "plms", 50),
    Method("DDIM, 250 steps", "ddim", 250),
    Method("DDIM, 50 steps, other seeds", "ddim", 50, OTHER_SEEDS),
)

PAGE = """# DPM-Solver++ at 20 steps beside DDIM at 50

Written by `make bench-sampling`; the numbers are in `sampling.json`.

**Machine:** {hardware}.

**Model:** `{run}`, {styles} style databases, {count} requests ({each} a style) with guidance
{guidance:g}, the same seeds for every method, {precision}. The judge is the evaluation's,
{judge_accuracy:.3f} right on database pictures that it never saw. Distance is one less the cosine of CLIP
features, to the picture that DDIM makes of the same request in 50 steps; ± is 1.96 standard errors. Methods
took turns, style by style.

{table}
"""


@dataclass
class Drawn:
    """What a method made: seconds of each style, CLIP features (n, dim) and judgements of all pictures."""

    seconds: list[float] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    right: list[npt.NDArray[np.bool_]] = field(default_factory=list)


def measure(recipe: Recipe, each: int, methods: Sequence[Method]) -> dict[str, Any]:
    """Sample `each` pictures of every style by every method, the first of which is the reference."""
    config = recipe[EvaluateConfig]
    sampler = Sampler.open(recipe.root, trained_model(recipe), config)
    styles = style_names(config, recipe.root)
    cells = make_style_groups(config, each, styles, read_prompts(config.prompts_file))
    classifier, _ = train_style_classifier(config, sampler, styles)
    drawn = {method.name: Drawn() for method in methods}
    asked = [cell for cell in cells if cell.mode == RETRIEVAL]
    for number, cell in enumerate(tqdm(asked, "styles", unit="style")):
        # the order turns, so that no method always meets the same neighbor on the machine
        for method in (*methods[number % len(methods) :], *methods[: number % len(methods)]):
            _draw(sampler, classifier, (cell.style, cell.requests), method, drawn[method.name])
    return {
        "hardware": hardware(),
        "run": f"{trained_model(recipe).folder}",
        "styles": len(styles),
        "each": each,
        "count": each * len(styles),
        "guidance": config.guidance,
        "precision": config.precision,
        "judge_accuracy": classifier.held_out_accuracy,
        "methods": [_row(method, drawn, methods[0]) for method in methods],
    }


def _draw(
    sampler: Sampler,
    classifier: TrainedClassifier,
    asked: tuple[str, Sequence[Request]],
    method: Method,
    drawn: Drawn,
) -> None:
    style, requests = asked
    changed = [
        replace(one, scheduler=method.scheduler, steps=method.steps, seed=one.seed + method.seed_offset)
        for one in requests
    ]
    began = time.perf_counter()
    samples = sampler.sample(changed)
    drawn.seconds.append(time.perf_counter() - began)
    features = sampler.encoder.encode_images([sample.picture for sample in samples])
    drawn.features.append(features)
    drawn.right.append(score(classifier, style, SampleFeatures(features, features)).correct)


def _row(method: Method, drawn: dict[str, Drawn], reference: Method) -> dict[str, Any]:
    mine, theirs = drawn[method.name], drawn[reference.name]
    distances = 1 - (np.concatenate(mine.features) * np.concatenate(theirs.features)).sum(axis=1)
    right = np.concatenate(mine.right)
    return {
        "name": method.name,
        "distance": float(distances.mean()),
        "error": float(1.96 * distances.std(ddof=1) / len(distances) ** 0.5),
        "style_accuracy": float(right.mean()),
        "interval": list(wilson_interval(int(right.sum()), len(right))),
        "seconds_per_image": sum(mine.seconds) / len(right),
        "times_as_fast": statistics.median(
            other / own for own, other in zip(mine.seconds, theirs.seconds, strict=True)
        ),
    }


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows = [
        [
            row["name"],
            f"{row['distance']:.4f} ± {row['error']:.4f}" if number else "0",
            f"{row['style_accuracy']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})",
            f"{row['seconds_per_image']:.3f}",
            f"{row['times_as_fast']:.2f}",
        ]
        for number, row in enumerate(result["methods"])
    ]
    heads = ["", "CLIP distance:", "taken for the style (95 %):", "s per image:", "times as fast:"]
    return PAGE.format(**result, table=markdown_table(heads, rows))


def main() -> None:
    """Sample, judge, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.sampling", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="of a finished run, with [evaluate]")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--each", type=int, default=20, help="pictures of every style and method, at least 2")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    options = parser.parse_args()

    def work() -> None:
        if options.each < 2:
            raise UserError(f"--each must be at least 2, got {options.each}")
        result = measure(load_recipe(options.recipe, options.overrides), options.each, METHODS)
        write_report(options.docs, "sampling", result, page(result))

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
