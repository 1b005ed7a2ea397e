"""`make bench-sampling`: samplers with 20 steps against DDIM and PLMS with 50, on a trained model.

Reads the finished run of a recipe, its style databases and the prompts of its [evaluate]. All methods sample the same
requests with the same seeds. The CLIP distance of their pictures to those of DDIM is compared with the distances for
other seeds and for five times the steps. Writes `docs/sampling.json` and `docs/sampling.md`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.common.on_recipe import recipe_benchmark_parser, report_on_recipe
from jobs.cli.recipe import Recipe
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from jobs.sample import trained_model
from retrieval.errors import UserError
from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.evaluate import database_rows, style_names, train_feature_judge
from trainer.evaluation.intervals import share
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.styles import RETRIEVAL, make_style_groups
from trainer.model.recipe import SchedulerName
from trainer.sampling.request import Request, read_prompts
from trainer.sampling.sampler import Sampler

Features = npt.NDArray[np.float32]
OTHER_SEEDS = 1 << 31
"""Added to the seeds, which are smaller, for another picture of the same request."""


@dataclass(frozen=True)
class SamplingMethod:
    """A scheduler with a number of steps."""

    name: str
    scheduler: SchedulerName
    steps: int
    seed_offset: int = 0


REFERENCE = SamplingMethod("DDIM, 50 steps", "ddim", 50)
METHODS = (
    REFERENCE,
    SamplingMethod("DPM-Solver++, 20 steps", "dpm++", 20),
    SamplingMethod("DDIM, 20 steps", "ddim", 20),
    SamplingMethod("UniPC, 20 steps", "unipc", 20),
    SamplingMethod("Euler, 20 steps", "euler", 20),
    SamplingMethod("Euler with Karras sigmas, 20 steps", "euler_karras", 20),
    SamplingMethod("PLMS, 50 steps", "plms", 50),
    SamplingMethod("DDIM, 250 steps", "ddim", 250),
    SamplingMethod("DDIM, 50 steps, other seeds", "ddim", 50, OTHER_SEEDS),
)

PAGE = """# Samplers with 20 steps against DDIM with 50

Written by `make bench-sampling`; the numbers are in `sampling.json`.

**Machine:** {hardware}.

**Model:** `{run}`, {styles} style databases, {count} requests ({each} per style) with guidance {guidance:g},
the same seeds for every method, {precision}. The style classifier is that of the evaluation, with accuracy
{judge_accuracy:.3f} on held-out database pictures. The distance is 1 - cosine of CLIP features, to the
picture of the same request by DDIM with 50 steps; ± is 1.96 standard errors. The methods alternate, style by
style.

{table}
"""


@dataclass
class MethodResults:
    """Results of a method for each style: seconds, CLIP features (n, dim), correct classifications (n,)."""

    seconds: list[float] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    correct: list[npt.NDArray[np.bool_]] = field(default_factory=list)


def measure(recipe: Recipe, each: int, methods: Sequence[SamplingMethod]) -> dict[str, Any]:
    """Sample `each` pictures of every style with every method. The first method is the reference."""
    if each < 2:
        raise UserError(f"--each must be at least 2, got {each}")
    config = recipe[EvaluateConfig]
    sampler = Sampler.open(recipe.root, trained_model(recipe), config)
    styles = style_names(config, recipe.root)
    groups = make_style_groups(config, each, styles, read_prompts(config.prompts_file))
    classifier = train_feature_judge(config, database_rows(config, sampler, styles))
    results = {method.name: MethodResults() for method in methods}
    with_neighbors = [group for group in groups if group.mode == RETRIEVAL]
    for number, group in enumerate(tqdm(with_neighbors, "styles", unit="style")):
        # The order rotates, so that no method always follows the same other method.
        for method in (*methods[number % len(methods) :], *methods[: number % len(methods)]):
            _sample(sampler, classifier, (group.style, group.requests), method, results[method.name])
    return {
        "hardware": hardware(),
        "run": f"{trained_model(recipe).folder}",
        "styles": len(styles),
        "each": each,
        "count": each * len(styles),
        "guidance": config.guidance,
        "precision": config.precision,
        "judge_accuracy": classifier.held_out_accuracy,
        "methods": [_row(method, results, methods[0]) for method in methods],
    }


def _sample(
    sampler: Sampler,
    classifier: TrainedClassifier,
    group: tuple[str, Sequence[Request]],
    method: SamplingMethod,
    results: MethodResults,
) -> None:
    style, requests = group
    changed = [
        replace(request, scheduler=method.scheduler, steps=method.steps, seed=request.seed + method.seed_offset)
        for request in requests
    ]
    start = time.perf_counter()
    samples = sampler.sample(changed)
    results.seconds.append(time.perf_counter() - start)
    features = sampler.encoder.encode_images([sample.picture for sample in samples])
    results.features.append(features)
    label = classifier.network.styles.index(style)
    results.correct.append(np.argmax(classifier.network.logits(features), axis=1) == label)


def _row(method: SamplingMethod, results: dict[str, MethodResults], reference: SamplingMethod) -> dict[str, Any]:
    result, base = results[method.name], results[reference.name]
    distances = 1 - (np.concatenate(result.features) * np.concatenate(base.features)).sum(axis=1)
    correct = np.concatenate(result.correct)
    return {
        "name": method.name,
        "distance": float(distances.mean()),
        "error": float(1.96 * distances.std(ddof=1) / len(distances) ** 0.5),
        "style_accuracy": float(correct.mean()),
        "interval": list(share(correct)[1:]),
        "seconds_per_image": sum(result.seconds) / len(correct),
        "times_as_fast": statistics.median(
            base_s / method_s for method_s, base_s in zip(result.seconds, base.seconds, strict=True)
        ),
    }


def page(result: dict[str, Any]) -> str:
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
    headings = ["", "CLIP distance:", "style accuracy (95 %):", "s per image:", "speedup:"]
    return PAGE.format(**result, table=markdown_table(headings, rows))


def main() -> None:
    parser = recipe_benchmark_parser("training.sampling", __doc__, "recipe of a finished run, with [evaluate]")
    parser.add_argument("--each", type=int, default=20, help="pictures per style and method, at least 2")
    report_on_recipe(parser, "sampling", lambda recipe, options: measure(recipe, options.each, METHODS), page)


if __name__ == "__main__":
    main()
