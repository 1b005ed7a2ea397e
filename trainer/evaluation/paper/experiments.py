"""paper: the paper's figures and measurements on a trained model (section 2.2, appendices B and C).

Makes `evaluate` first if it is not there; reads its samples, the model, the databases and, where they stand,
the training set. Writes below `runs/<name>/paper/` the samples of figures and controls, `paper.json` and a
PNG of each figure. Everything is a piece, kept when the stage is interrupted.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, read_manifest
from retrieval.storage.root import Root
from trainer.data.loader import Loader
from trainer.data.plan import is_finished, make_plan
from trainer.evaluation import evaluate
from trainer.evaluation.drawing import draw_cells, place, read_shown
from trainer.evaluation.evaluate import style_names, train_judge
from trainer.evaluation.paper import charts, copying, held_out, memorization
from trainer.evaluation.paper.controls import CONTROLS, control, random_rows
from trainer.evaluation.paper.figures import draw_figure, make_figures
from trainer.evaluation.paper.gallery import training_images
from trainer.evaluation.paper.intervals import Bootstrap
from trainer.evaluation.paper.paper_tables import Ruler, tables
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.paper.timing import retrieval_times
from trainer.evaluation.styles import RETRIEVAL, Cell, make_cells
from trainer.recipe import Training
from trainer.sampling.batches import Batch, make_batches
from trainer.sampling.conditioning import Conditioned
from trainer.sampling.picture import grid_png
from trainer.sampling.recipe import EvaluateConfig
from trainer.sampling.request import TRAINING_DATABASE, read_prompts
from trainer.sampling.resumable import Pieces
from trainer.sampling.sampler import Sampler, Trained, upstream_of

log = logging.getLogger("paper")

FIGURE_PROMPTS = 4
Made = tuple[Any, dict[str, bytes]]
"""Values for JSON, and files by name."""


@dataclass(frozen=True)
class Subject:
    """What is experimented on: a finished run, how it was trained and how it is evaluated."""

    trained: Trained
    training: Training
    evaluate: EvaluateConfig

    @property
    def folder(self) -> str:
        """Where the experiments stand, relative to the root."""
        return f"runs/{self.trained.name}/paper"


def run(config: PaperConfig, subject: Subject, root: Root) -> Manifest:
    """All experiments; finished pieces of an interrupted run are kept."""
    began = time.monotonic()
    evaluated = evaluate.run(subject.evaluate, subject.trained, root)
    styles = style_names(subject.evaluate, root)
    upstream = {
        "evaluate": evaluated.identity,
        **upstream_of(root, subject.trained, (*styles, TRAINING_DATABASE)),
    }
    for stage in ("embed", "neighbors"):
        if root.exists(f"{stage}/manifest.json"):
            upstream[stage] = read_manifest(root, stage).fingerprint
    pieces = Pieces(root, subject.folder, fingerprint("paper", schema.VERSION, config, upstream))
    if (finished := pieces.manifest()) is not None:
        log.info(f"paper: {root.at(subject.folder)} is finished")
        return finished
    experiments = Experiments(config, subject, Sampler.open(root, subject.trained, subject.evaluate), pieces)
    pieces.begin()
    records, found = experiments.all()
    files = [root.write_json(f"{subject.folder}/paper.json", found)]
    return pieces.finish(
        Manifest(
            stage=subject.folder,
            schema_version=schema.VERSION,
            fingerprint=pieces.fingerprint,
            upstream=upstream,
            config=config.model_dump(mode="json"),
            shards=(*records, ShardRecord("values", 1, tuple(files))),
            values={"styles": list(styles)},
            seconds=time.monotonic() - began,
        )
    )


class Experiments:
    """The experiments, each a piece or several; what they share is opened once."""

    def __init__(self, config: PaperConfig, subject: Subject, sampler: Sampler, pieces: Pieces) -> None:
        self._config, self._subject, self._sampler, self._pieces = config, subject, sampler, pieces
        self._bootstrap = Bootstrap(config.bootstrap_draws, config.seed)
        asked, root = subject.evaluate, pieces.root
        self._evaluated = Pieces(root, f"runs/{subject.trained.name}/evaluate", "")
        self._styles, self._prompts = style_names(asked, root), read_prompts(asked.prompts_file)
        self._cells = make_cells(asked, asked.samples_per_style, self._styles, self._prompts)
        self._retrieved = [cell for cell in self._cells if cell.mode == RETRIEVAL]
        self._told = {cell.style: self._conditioned(cell) for cell in self._retrieved}
        self._figures = make_figures(
            config, asked, config.prompts or self._prompts[:FIGURE_PROMPTS], self._styles
        )
        sampler.check([request for figure in self._figures for request in figure.cell.requests])

    def all(self) -> tuple[list[ShardRecord], dict[str, Any]]:
        """Do what is not done. Returns the records of all pieces, and the values of `paper.json`."""
        figures = draw_cells(self._sampler, [figure.cell for figure in self._figures], self._pieces)
        controls = self._controls()
        drawn = draw_cells(self._sampler, controls, self._pieces, self._plan_control)
        records = [*figures, *drawn]
        found: dict[str, Any] = {"asked": self._asked()}
        work: dict[str, Callable[[], Made]] = {
            "sheets": self._sheets,
            "tables": lambda: self._tables(controls),
            "held_out": self._held_out,
            "copying": self._copying,
            "times": self._times,
        }
        for name, make in work.items():
            record, found[name] = self._once(name, make)
            records.append(record)
        return records, found

    def _once(self, name: str, make: Callable[[], Made]) -> tuple[ShardRecord, Any]:
        """A piece of values and files, unless it is done."""
        root, folder = self._pieces.root, self._pieces.stage
        record = self._pieces.done(name)
        if record is None:
            began = time.monotonic()
            values, pictures = make()
            files = [root.write_bytes(f"{folder}/{file}", data) for file, data in pictures.items()]
            files.append(root.write_json(f"{folder}/{name}.json", values))
            record = self._pieces.write(name, files, 1)
            log.info(f"paper: {name}  {time.monotonic() - began:.1f} s")
        return record, root.read_json(f"{folder}/{name}.json")

    def _asked(self) -> dict[str, Any]:
        asked = self._subject.evaluate
        names = ("samples_per_style", "k", "guidance", "steps", "scheduler", "precision")
        return {"styles": list(self._styles), **{name: getattr(asked, name) for name in names}}

    def _conditioned(self, cell: Cell) -> list[Conditioned]:
        """What retrieval gives for a cell, in its order."""
        found = {
            position: item
            for batch in self._sampler.plan(cell.requests)
            for position, item in zip(batch.positions, batch.items, strict=True)
        }
        return [found[i] for i in range(len(found))]

    def _controls(self) -> list[Cell]:
        return [
            Cell(name, cell.style, cell.prompts, cell.requests)
            for name in CONTROLS
            for cell in self._retrieved
        ]

    def _plan_control(self, cell: Cell) -> list[Batch]:
        rng = np.random.default_rng([self._config.seed, *cell.style.encode()])
        counts = [len(one.context) - 1 for one in self._told[cell.style]]
        rows = random_rows(self._sampler.database(TRAINING_DATABASE), counts, rng)
        told = control(cell.mode, cell.style, self._told, rows)
        return make_batches(told, self._sampler.compute.batch_size)

    def _sheets(self) -> Made:
        names = [figure.name for figure in self._figures]
        return names, {f"{figure.name}.png": draw_figure(figure, self._pieces) for figure in self._figures}

    def _tables(self, controls: list[Cell]) -> Made:
        places = [(cell, self._evaluated) for cell in self._cells]
        places += [(cell, self._pieces) for cell in controls]
        shown = {(cell.mode, cell.style): read_shown(self._sampler, cell, where) for cell, where in places}
        judge, reference = train_judge(self._subject.evaluate, self._sampler, self._styles)
        found = tables(shown, Ruler(judge, reference, self._bootstrap))
        return found, {
            "improvement.png": charts.improvement_chart(found),
            "modes.png": charts.modes_chart(found),
        }

    def _held_out(self) -> Made:
        root, sampler = self._pieces.root, self._sampler
        try:
            plan = make_plan(self._subject.training, root, sampler.autoencoder)
            if not is_finished(plan, root):
                raise UserError(f"{root.at(self._subject.trained.folder)} was not trained by this recipe.")
            if not any(plan.samples.held_out):
                raise UserError("train.validation_images is 0: no image was held out.")
        except UserError as error:
            # A model from elsewhere comes without its training set, and the other experiments stand.
            return {"left_out": str(error)}, {}
        unet = cast(torch.nn.Module, sampler.unet)
        losses = held_out.held_out_losses(
            unet, plan, Loader(plan, root, 0, 1), sampler.autoencoder, self._config.loss_draws
        )
        found = held_out.summary(losses, self._bootstrap)
        return found, {"held_out.png": charts.loss_chart(found)}

    def _copying(self) -> Made:
        config, root = self._config, self._pieces.root
        told = [one for cell in self._retrieved for one in self._told[cell.style]]
        samples = copying.Samples(
            root=root,
            names=tuple(
                place(cell, self._evaluated, n) for cell in self._retrieved for n in range(len(cell.requests))
            ),
            styles=tuple(one.request.database for one in told),
            features=np.concatenate(
                [read_shown(self._sampler, cell, self._evaluated).pictures for cell in self._retrieved]
            ),
            told=tuple(told),
        )
        databases = {style: self._sampler.database(style) for style in self._styles}
        most = self._subject.evaluate.reference_rows
        originals: list[copying.Originals] = [
            copying.OwnNeighbors(databases, config.style_pictures, most, config.seed)
        ]
        if (images := training_images(root, config.training_images, config.seed)) is not None:
            originals.append(copying.Training(root, images))
        compared = [pair for one in originals for pair in copying.compare(samples, one, config.closest_pairs)]
        files = {f"closest_{comparison.name}.png": grid_png(grid) for comparison, grid in compared}
        files["distances.png"] = charts.distance_chart([comparison for comparison, _ in compared])
        return [memorization.summary(comparison, self._bootstrap) for comparison, _ in compared], files

    def _times(self) -> Made:
        config = self._config
        prompts = [self._prompts[i % len(self._prompts)] for i in range(config.retrieval_queries)]
        queries = self._sampler.encoder.encode_texts(prompts)
        found = [
            {
                "database": name,
                **retrieval_times(self._sampler.database(name), queries, config.retrieval_k, self._bootstrap),
            }
            for name in (*self._styles, TRAINING_DATABASE)
        ]
        return found, {"times.png": charts.time_chart(found)}
