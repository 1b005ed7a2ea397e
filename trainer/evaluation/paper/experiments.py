"""paper: the paper's figures and measurements on a trained model (section 2.2, appendices B and C).

Runs `evaluate` first if needed. Reads its samples, the model, the databases and, if present, the training set. Writes
below `runs/<name>/paper/` samples of figures and controls, `paper.json` and a PNG of each figure. Experiments resume.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import Root
from trainer.data.loader import Loader
from trainer.data.plan import is_finished, make_plan
from trainer.evaluation import evaluate
from trainer.evaluation.evaluate import make_evaluator, style_names
from trainer.evaluation.intervals import Bootstrap
from trainer.evaluation.paper import charts, copy_check, copy_distances, held_out
from trainer.evaluation.paper.controls import CONTROLS, control, random_rows, tables
from trainer.evaluation.paper.figures import draw_by_mode, draw_figure, make_figures
from trainer.evaluation.paper.real_images import training_images
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.paper.timing import retrieval_times
from trainer.evaluation.pixel_judge import pictures_digest
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.sample_groups import draw_groups, features_by_group, picture_path, read_features
from trainer.evaluation.scores import Evaluator, results
from trainer.evaluation.styles import NO_NEIGHBORS, RETRIEVAL, StyleGroup, make_style_groups, require_read_styles
from trainer.evaluation.tradeoff import make_settings, setting_groups, tradeoff
from trainer.recipe import TrainingRecipe
from trainer.sampling.batches import SamplingBatch, make_batches
from trainer.sampling.conditioning import ConditionedRequest
from trainer.sampling.picture import grid_png
from trainer.sampling.request import TRAINING_DATABASE, read_prompts, require_text
from trainer.sampling.resumable import ResumableItems
from trainer.sampling.sampler import Sampler, TrainedModel, upstream_fingerprints

log = logging.getLogger("paper")

FIGURE_PROMPTS = 4
Result = tuple[Any, dict[str, bytes]]
"""Values for JSON, and files by name."""


@dataclass(frozen=True)
class ModelUnderTest:
    """A finished run with its training recipe and its evaluation settings."""

    trained: TrainedModel
    training: TrainingRecipe
    evaluate: EvaluateConfig

    @property
    def folder(self) -> str:
        """Folder of the experiments, relative to the root."""
        return f"runs/{self.trained.name}/paper"


def run(config: PaperConfig, model: ModelUnderTest, root: Root) -> Manifest:
    """Run all experiments. Finished items of an earlier run are kept."""
    started = time.monotonic()
    for prompt in config.prompts:
        require_text(prompt)
    evaluated = evaluate.run(model.evaluate, model.trained, root)
    styles = style_names(model.evaluate, root)
    if known := set(styles) & set(config.unknown_styles):
        raise UserError(f"paper.unknown_styles has {min(known)!r}, a style of [evaluate]. Leave it out of one of them.")
    upstream = {
        "evaluate": evaluated.identity,
        **upstream_fingerprints(root, model.trained, (*styles, *config.unknown_styles, TRAINING_DATABASE)),
    }
    if config.unknown_judge_pictures:
        upstream["unknown_judge_pictures"] = pictures_digest(config.unknown_judge_pictures)
    for stage in ("embed", "neighbors"):
        if root.exists(f"{stage}/manifest.json"):
            upstream[stage] = read_manifest(root, stage).files_fingerprint
    items = ResumableItems(root, model.folder, config, upstream)
    if (finished := items.finished_manifest()) is not None:
        log.info(f"paper: {root.at(model.folder)} is finished")
        return finished
    experiments = Experiments(config, model, Sampler.open(root, model.trained, model.evaluate), items)
    with items.building():
        records, values = experiments.run_all()
        file = root.write_json(f"{model.folder}/paper.json", values)
        records.append(ShardRecord("values", 1, (file,)))
        return items.finish(records, {"styles": list(styles)}, time.monotonic() - started)


class Experiments:
    """All experiments on one model. Each is one or several items of the stage."""

    def __init__(self, config: PaperConfig, model: ModelUnderTest, sampler: Sampler, items: ResumableItems) -> None:
        self._config, self._model, self._sampler, self._items = config, model, sampler, items
        self._bootstrap = Bootstrap(config.bootstrap_draws, config.seed)
        settings, root = model.evaluate, items.root
        self._evaluated = ResumableItems(root, f"runs/{model.trained.name}/evaluate", settings, {})
        self._styles, self._prompts = style_names(settings, root), read_prompts(settings.prompts_file)
        self._groups, self._unknown_groups = (
            make_style_groups(settings, settings.samples_per_style, names, self._prompts, settings.prompts_per_style)
            for names in (self._styles, config.unknown_styles)
        )
        require_read_styles(self._unknown_groups, sampler.encoder.truncated)
        self._retrieved = [group for group in self._groups if group.mode == RETRIEVAL]
        self._conditioned = {group.style: self._condition(group) for group in self._retrieved}
        self._figures = make_figures(config, settings, config.prompts or self._prompts[:FIGURE_PROMPTS], self._styles)
        choices = (config.tradeoff_k or (settings.k,), config.tradeoff_intervals, config.tradeoff_neighbor_weights)
        self._settings = make_settings(config.tradeoff_guidance, *choices)
        self._tradeoff_groups = setting_groups(self._retrieved, self._settings, config.tradeoff_samples)
        groups = [*(figure.group for figure in self._figures), *self._tradeoff_groups, *self._unknown_groups]
        sampler.check([request for group in groups for request in group.requests])

    def run_all(self) -> tuple[list[ShardRecord], dict[str, Any]]:
        """Run the experiments without a record. Returns all records and the values of `paper.json`."""
        records = draw_groups(self._sampler, [figure.group for figure in self._figures], self._items)
        controls = [
            replace(group, name=f"{name}/{group.style}", mode=name) for name in CONTROLS for group in self._retrieved
        ]
        records += draw_groups(self._sampler, controls, self._items, self._plan_control)
        records += draw_groups(self._sampler, [*self._tradeoff_groups, *self._unknown_groups], self._items)
        values: dict[str, Any] = {"asked": self._asked()}
        experiments: dict[str, Callable[[], Result]] = {
            "sheets": self._sheets,
            "tables": lambda: self._tables(controls),
            "held_out": self._held_out,
            "copying": self._copying,
            "times": self._times,
            **({"tradeoff": self._tradeoff} if self._settings else {}),
            **({"unknown_styles": self._unknown_styles} if self._unknown_groups else {}),
        }
        for name, experiment in experiments.items():
            record, values[name] = self._run_once(name, experiment)
            records.append(record)
        return records, values

    def _run_once(self, name: str, experiment: Callable[[], Result]) -> tuple[ShardRecord, Any]:
        """Run an experiment unless it has a record. Returns its record and its values."""
        root, folder = self._items.root, self._items.stage
        record = self._items.read_record(name)
        if record is None:
            started = time.monotonic()
            values, pictures = experiment()
            files = [root.write_bytes(f"{folder}/{file}", data) for file, data in pictures.items()]
            files.append(root.write_json(f"{folder}/{name}.json", values))
            record = self._items.write_record(name, files, 1)
            log.info(f"paper: {name}  {time.monotonic() - started:.1f} s")
        return record, root.read_json(f"{folder}/{name}.json")

    def _asked(self) -> dict[str, Any]:
        names = ["samples_per_style", "k", "neighbor_weight", "guidance", "guidance_interval", "negative_prompt"]
        names += ["steps", "scheduler", "height", "width", "precision"]
        settings = {name: getattr(self._model.evaluate, name) for name in names}
        return {"styles": list(self._styles), **settings}

    def _condition(self, group: StyleGroup) -> list[ConditionedRequest]:
        """The requests of a group with their neighbors, in order."""
        conditioned = {
            position: item
            for batch in self._sampler.plan(group.requests)
            for position, item in zip(batch.positions, batch.items, strict=True)
        }
        return [conditioned[i] for i in range(len(conditioned))]

    def _plan_control(self, group: StyleGroup) -> list[SamplingBatch]:
        rng = np.random.default_rng([self._config.seed, *group.style.encode()])
        counts = [len(request.context) - 1 for request in self._conditioned[group.style]]
        rows = random_rows(self._sampler.database(TRAINING_DATABASE), counts, rng, self._sampler.context_norm)
        requests = control(group.mode, group.style, self._conditioned, rows)
        return make_batches(requests, self._sampler.compute.batch_size)

    def _sheets(self) -> Result:
        names = [figure.name for figure in self._figures]
        return names, {f"{figure.name}.png": draw_figure(figure, self._items) for figure in self._figures}

    def _tables(self, controls: list[StyleGroup]) -> Result:
        evaluated = features_by_group(self._sampler, self._groups, self._evaluated)
        values = tables({**evaluated, **features_by_group(self._sampler, controls, self._items)}, self._evaluator)
        return values, {"improvement.png": charts.improvement_chart(values), "modes.png": charts.modes_chart(values)}

    @cached_property
    def _evaluator(self) -> Evaluator:
        return make_evaluator(self._model.evaluate, self._sampler, self._styles, self._bootstrap)

    def _tradeoff(self) -> Result:
        features = dict(features_by_group(self._sampler, self._tradeoff_groups, self._items))
        for group in self._groups:
            if group.mode == NO_NEIGHBORS:
                plain = read_features(self._sampler, group, self._evaluated)
                features[NO_NEIGHBORS, group.style] = plain.first(self._config.tradeoff_samples)
        values = tradeoff(self._settings, features, self._evaluator)
        return values, {"tradeoff.png": charts.tradeoff_chart(values)}

    def _unknown_styles(self) -> Result:
        """The modes of the evaluation for styles that no caption names, by judges of these and all other styles."""
        settings = self._model.evaluate.model_copy(update={"judge_pictures": self._config.unknown_judge_pictures})
        styles = (*self._styles, *self._config.unknown_styles)
        evaluator = make_evaluator(settings, self._sampler, styles, self._bootstrap)
        features = features_by_group(self._sampler, self._unknown_groups, self._items)
        return results(features, evaluator), {"unknown_styles.png": draw_by_mode(self._unknown_groups, self._items)}

    def _held_out(self) -> Result:
        root, sampler = self._items.root, self._sampler
        try:
            plan = make_plan(self._model.training, root, sampler.autoencoder)
            if not is_finished(plan, root):
                raise UserError(f"{root.at(self._model.trained.folder)} was not trained by this recipe.")
            if (count := sum(plan.training_set.held_out)) < 2:
                raise UserError(
                    f"images that train.validation_images held out: {count}; wanted at least 2, as an image also gets "
                    "the neighbors of another. Set it to 2 or more and train again."
                )
        except UserError as error:
            # An imported model comes without its training set; the other experiments do not need it.
            return {"left_out": str(error)}, {}
        unet, loader = cast(torch.nn.Module, sampler.unet), Loader(plan, root, 0, 1)
        draws = self._config.timesteps_per_image
        losses = held_out.held_out_losses(unet, plan, loader, sampler.autoencoder, draws)
        values = held_out.summary(losses, self._bootstrap)
        return values, {"held_out.png": charts.loss_chart(values)}

    def _copying(self) -> Result:
        config, root = self._config, self._items.root
        samples = self._generated_samples()
        databases = {style: self._sampler.database(style) for style in self._styles}
        max_rows = self._model.evaluate.reference_rows_per_style
        sources: list[copy_check.RealImages] = [
            copy_check.DatabaseImages(databases, config.style_pictures_folder, max_rows, config.seed)
        ]
        if (images := training_images(root, config.max_training_images, config.seed)) is not None:
            sources.append(copy_check.TrainingSetImages(root, images))
        compared = [pair for source in sources for pair in copy_check.compare(samples, source, config.closest_pairs)]
        files = {f"closest_{comparison.name}.png": grid_png(grid) for comparison, grid in compared}
        files["distances.png"] = charts.distance_chart([comparison for comparison, _ in compared])
        return [copy_distances.summary(comparison, self._bootstrap) for comparison, _ in compared], files

    def _generated_samples(self) -> copy_check.GeneratedSamples:
        """The evaluation's samples with neighbors of the style databases."""
        conditioned = [item for group in self._retrieved for item in self._conditioned[group.style]]
        features = [read_features(self._sampler, group, self._evaluated) for group in self._retrieved]
        return copy_check.GeneratedSamples(
            root=self._items.root,
            names=tuple(
                picture_path(group, self._evaluated, n) for group in self._retrieved for n in range(len(group.requests))
            ),
            styles=tuple(item.request.database for item in conditioned),
            features=np.concatenate([group.pictures for group in features]),
            conditioned=tuple(conditioned),
        )

    def _times(self) -> Result:
        config = self._config
        prompts = [self._prompts[i % len(self._prompts)] for i in range(config.retrieval_queries)]
        queries = self._sampler.encoder.encode_texts(prompts)
        values = []
        for name in (*self._styles, TRAINING_DATABASE):
            times = retrieval_times(self._sampler.database(name), queries, config.retrieval_k, self._bootstrap)
            values.append({"database": name, **times})
        return values, {"times.png": charts.time_chart(values)}
