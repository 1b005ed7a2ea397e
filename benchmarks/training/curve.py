"""`make bench-curve`: what the demo's samples show after more and more training.

Reads the checkpoints of a run, finished or not, and the run that it started from. The averaged weights of each sample
the same held-out prompts with the same seeds and neighbors; the judge of contents reads the pictures. Writes
`docs/curve.json`, `docs/curve.md` and its pictures. Samples are kept in `runs/bench/curve/`: a repeated call samples
only new checkpoints, and keeps the samples of those that training has deleted meanwhile.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from benchmarks.common.on_recipe import recipe_benchmark_parser, report_on_recipe
from benchmarks.common.report import SCRATCH
from benchmarks.training.conditionings import WITHOUT_STYLE, other_conditionings
from benchmarks.training.curve_page import draw_curve, draw_samples, page
from jobs.cli.recipe import Recipe
from jobs.demo.judge.labels import equal, labels_of, shares
from jobs.demo.judge.network import ContentJudge, Pixels, train_judge
from jobs.demo.prerequisites import VERSION
from jobs.demo.recipe import JudgeTraining, WorldConfig
from jobs.demo.report.numbers import CONTENT_GOALS
from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import contents_by_prompt
from jobs.reporting.hardware import hardware
from jobs.sample import trained_model
from jobs.train import ranks_here, training_recipe
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.temp_folders import temporary_folder
from trainer.checkpoint.export import export_run, read_model_weights
from trainer.data.plan import TrainingPlan, make_plan
from trainer.evaluation.evaluate import style_names
from trainer.evaluation.intervals import ENDS, Bootstrap, Estimate, interval
from trainer.evaluation.pixel_judge import thumbnails
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.styles import RETRIEVAL, make_style_groups, style_words
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainConfig
from trainer.sampling.request import Request, read_prompts
from trainer.sampling.sampler import Sampler
from trainer.tracking.training_log import METRICS, read_step_metrics
from trainer.training.train import checkpoints_of

Weights = dict[str, torch.Tensor]
SCHEDULER = "dpm++"
QUALITY = 88
MIN_POINTS, DRAWS, MAX_DOUBLINGS = 3, 2000, 40
"""Points that a trend needs; resamples of its interval; logarithm of the most images that it may name."""


@dataclass(frozen=True)
class CurveRequests:
    """What every checkpoint samples: the scenes that are asked for, and their requests, style by style."""

    scenes: tuple[Scene, ...]
    requests: tuple[Request, ...]

    @classmethod
    def of(cls, recipe: Recipe, each: int, steps: int) -> "CurveRequests":
        """The first `each` samples of every style of the evaluation, with `steps` steps of SCHEDULER."""
        config = recipe[EvaluateConfig]
        styles = style_names(config, recipe.root)
        groups = make_style_groups(config, each, styles, read_prompts(config.prompts_file), config.prompts_per_style)
        pairs = [
            (Scene(contents_by_prompt()[text], style_words(group.style), 0), request)
            for group in groups
            if group.mode == RETRIEVAL
            for text, request in zip(group.prompts, group.requests, strict=True)
        ]
        requests = (replace(request, scheduler=SCHEDULER, steps=steps) for _, request in pairs)
        return cls(tuple(scene for scene, _ in pairs), tuple(requests))


def read_judge(recipe: Recipe, folder: Path) -> ContentJudge:
    """The judge of contents, trained as in the demo and kept in a folder."""
    config, seed = recipe[JudgeTraining], recipe[WorldConfig].seed
    path = folder / f"judge-{_digest(VERSION, seed, config.output_fields())}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        weights = train_judge(config, seed).state_dict()
        save_file({name: values.contiguous() for name, values in weights.items()}, partial)
        os.replace(partial, path)
    judge = ContentJudge().eval()
    judge.load_state_dict(load_file(path))
    return judge


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()[:16]


def stored_weights(plan: TrainingPlan, root: Root, known: Collection[int]) -> dict[int, Weights]:
    """Averaged weights by step of the run's checkpoints, and at 0 those of the run it started from.

    known: steps that are left out. Raises UserError for checkpoints of another run, and if there is nothing at all.
    """
    train, checkpoints = plan.config.train, checkpoints_of(plan, root)
    checkpoints.check(train.steps)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in build_unet(plan.config.model).named_parameters()}
    # All are read before the first is sampled: a run in training deletes old checkpoints.
    weights = {}
    if train.start_from and 0 not in known:
        weights[0] = read_model_weights(root, f"runs/{train.start_from}/train")
    for entry in checkpoints.entries():
        if entry["step"] not in known:
            [weights[entry["step"]]] = checkpoints.read_averages(entry, shapes)
    if not weights and not known:
        raise UserError(f"{checkpoints.root.url} has no checkpoint yet. Train, then run this command again.")
    return weights


def sample_weights(recipe: Recipe, plan: TrainingPlan, weights: Weights, requests: Sequence[Request]) -> Pixels:
    """The pictures (n, edge, edge, 3) that weights sample. They become a finished run in a temporary folder."""
    with temporary_folder() as folder, tqdm(total=len(requests), unit="sample") as progress:
        databases = recipe.root.local_path("databases").absolute()
        (folder / "databases").symlink_to(databases)
        export_run(plan, Root(folder), weights, {}, 0.0)
        sampler = Sampler.open(Root(folder), trained_model(recipe), recipe[EvaluateConfig])
        return thumbnails(sample.picture for sample in sampler.sample(requests, progress.update))


def sample_checkpoints(
    recipe: Recipe, wanted: CurveRequests, folder: Path, skipped: Collection[int] = ()
) -> dict[int, Pixels]:
    """The pictures of every checkpoint by step, kept in a folder. skipped: steps that are not sampled."""
    plan = make_plan(training_recipe(recipe), recipe.root, Autoencoder.load(recipe[AutoencoderConfig], "cpu"))
    kept = folder / f"{recipe[TrainConfig].name}-{_digest(plan.checkpoint_identity, wanted.requests)}"
    kept.mkdir(parents=True, exist_ok=True)
    known = {int(path.stem): path for path in kept.glob("*.npy")}
    for step, weights in stored_weights(plan, recipe.root, {*known, *skipped}).items():
        pixels = sample_weights(recipe, plan, weights, wanted.requests)
        known[step] = kept / f"{step:08d}.npy"
        partial = known[step].with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, pixels)
        os.replace(partial, known[step])
    return {step: np.load(known[step], allow_pickle=False) for step in sorted(known)}


def measure_conditionings(
    recipe: Recipe, wanted: CurveRequests, folder: Path, steps: Collection[int]
) -> dict[str, dict[str, Estimate]]:
    """What the last of the sampled checkpoints shows with other conditionings: shares by conditioning and attribute.

    Raises UserError if training has deleted that checkpoint meanwhile.
    """
    last, labels, judge = max(steps), labels_of(wanted.scenes), read_judge(recipe, folder)
    conditioned = other_conditionings(wanted.scenes, wanted.requests, Encoder(recipe[ClipConfig]))
    together = replace(wanted, requests=tuple(chain(*conditioned.values())))
    pictures = sample_checkpoints(recipe, together, folder, {*steps} - {last})
    if last not in pictures:
        raise UserError(f"training has deleted its checkpoint of step {last} meanwhile. Run this command again.")
    parts = zip(conditioned, np.split(pictures[last], len(conditioned)), strict=True)
    result = {name: shares(equal(judge.predict(part), labels), labels) for name, part in parts}
    for name in WITHOUT_STYLE:
        del result[name]["style"]
    return result


def training_cost(root: Root, name: str, last_step: float = math.inf) -> dict[str, float]:
    """Images and hours of a run's steps up to one of them, and the learning rate of that, from its metrics."""
    entries = read_step_metrics(root.local_path(f"runs/{name}/train/{METRICS}"))
    entries = [entry for entry in entries if entry.step <= last_step]
    if not entries:
        return {"images": 0, "hours": 0.0, "learning_rate": 0.0}
    counts = np.diff([0, *(entry.step for entry in entries)])
    seconds = counts @ np.array([entry.seconds_per_step + entry.paused_s for entry in entries])
    return {"images": entries[-1].images, "hours": seconds / 3600, "learning_rate": entries[-1].learning_rate}


def trend(images: Sequence[float], correct: npt.NDArray[np.bool_], contents: Sequence[Any]) -> dict[str, Any] | None:
    """A line through the log-odds of a share over the logarithm of the images seen; None with too few points.

    correct: (points, n); contents: of the n samples, which are resampled together; None also for a single content.
    Returns the slope for twice the images, and the images at which the line is at the goal of the shape, each with its
    interval; an end is None if the line does not reach it.
    """
    if len(images) < MIN_POINTS or len(set(contents)) < 2:
        return None
    weights = Bootstrap(DRAWS, seed=0).weights(contents)
    counts = np.concatenate([np.ones((1, len(contents)), np.int64), weights])
    shares_ = (counts @ correct.T + 0.5) / (counts.sum(axis=1, keepdims=True) + 1)
    slopes, levels = np.polyfit(np.log2(images), np.log(shares_ / (1 - shares_)).T, 1)
    goal = CONTENT_GOALS["shape"]
    rising = slopes > 0
    doublings = np.full(len(slopes), np.inf)
    doublings[rising] = (np.log(goal / (1 - goal)) - levels[rising]) / slopes[rising]
    ends = np.quantile(doublings[1:], ENDS, method="nearest")
    reached = [2.0**value if value < MAX_DOUBLINGS else None for value in (doublings[0], *ends)]
    return {"goal": goal, "slope": interval(float(slopes[0]), slopes[1:], contents), "images": reached}


def measure(recipe: Recipe, wanted: CurveRequests, folder: Path) -> tuple[dict[str, Any], dict[int, Pixels]]:
    """Sample and judge all checkpoints. Returns the values of `curve.json` and the pictures by step."""
    train, config, labels = recipe[TrainConfig], recipe[EvaluateConfig], labels_of(wanted.scenes)
    pictures = sample_checkpoints(recipe, wanted, folder)
    judge = read_judge(recipe, folder)
    flags = {step: equal(judge.predict(pixels), labels) for step, pixels in pictures.items()}
    before = training_cost(recipe.root, train.start_from) if train.start_from else {"images": 0, "hours": 0.0}
    points = []
    for step in pictures:
        cost = training_cost(recipe.root, train.name, step)
        total = {name: before[name] + cost[name] for name in ("images", "hours")}
        points.append({"step": step, **cost, **total, "shares": shares(flags[step], labels)})
    shapes = np.stack([of_step["shape"] for of_step in flags.values()])
    return {
        "hardware": hardware(),
        "run": train.folder,
        "start_from": train.start_from,
        "planned": train.steps,
        "batch": train.global_batch,
        "ranks": ranks_here(train),
        "count": len(wanted.requests),
        "styles": len({scene.style for scene in wanted.scenes}),
        "k": config.k,
        "guidance": config.guidance,
        "steps": wanted.requests[0].steps,
        "scheduler": SCHEDULER,
        "points": points,
        "trend": trend([point["images"] for point in points], shapes, [scene.content for scene in wanted.scenes]),
        "links": read_manifest(recipe.root, "judge").values["links"],
        "conditionings": measure_conditionings(recipe, wanted, folder, pictures),
    }, pictures


def write_pictures(result: dict[str, Any], pictures: dict[int, Pixels], wanted: CurveRequests, docs: Path) -> None:
    """Write the pictures of the page to `images/`."""
    buffer = BytesIO()
    texts = [f"{request.prompt}; {scene.style}" for scene, request in zip(wanted.scenes, wanted.requests, strict=True)]
    draw_samples(result["points"], pictures, texts).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    images = Root(docs / "images")
    images.write_bytes("curve-samples.jpg", buffer.getvalue())
    images.write_bytes("curve.png", draw_curve(result["points"]))


def measure_and_draw(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Measure as the arguments say, and write the pictures of the page."""
    if options.each < 1:
        raise UserError(f"--each must be at least 1, got {options.each}")
    wanted = CurveRequests.of(recipe, options.each, options.steps)
    result, pictures = measure(recipe, wanted, SCRATCH / "curve")
    write_pictures(result, pictures, wanted, options.docs)
    return result


def main() -> None:
    parser = recipe_benchmark_parser("training.curve", __doc__, "recipe of the demo with the run in [train] name")
    parser.add_argument("--each", type=int, default=10, help="samples of each style at each checkpoint (10)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a sample (20)")
    report_on_recipe(parser, "curve", measure_and_draw, page)


if __name__ == "__main__":
    main()
