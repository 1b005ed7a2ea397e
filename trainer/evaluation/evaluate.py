"""evaluate: does swapping the database restyle the model? (paper section 2.2, appendix C)

Reads `runs/<name>/train`, the style databases and `index`. Writes, below `runs/<name>/evaluate/`, the
samples of each mode and style with their CLIP features, the judge, `evaluation.json`, `bars.png` and a
contact sheet of each mode. All modes share prompts and seeds, so that only the way of asking differs.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint
from retrieval.storage.root import Root
from trainer.evaluation.charts import LABELS, draw_bars
from trainer.evaluation.classifier import TrainedClassifier, save_classifier, train_classifier
from trainer.evaluation.drawing import draw_cells, place, read_shown
from trainer.evaluation.judgement import Reference, evaluation
from trainer.evaluation.metrics import Features, balls
from trainer.evaluation.styles import MODES, Cell, make_cells, style_words
from trainer.sampling.picture import Grid, grid_png, open_picture
from trainer.sampling.recipe import EvaluateConfig
from trainer.sampling.request import TRAINING_DATABASE, prompts_digest, read_prompts
from trainer.sampling.resumable import Pieces
from trainer.sampling.sampler import Sampler, Trained, database_names, upstream_of

log = logging.getLogger("evaluate")

SHEET_COLUMNS = 8


def run(config: EvaluateConfig, trained: Trained, root: Root) -> Manifest:
    """Sample, judge and report; finished modes and styles of an interrupted run are kept."""
    began = time.monotonic()
    if not config.prompts_file:
        raise UserError("[evaluate] prompts_file is not set. Wanted: a text file with one prompt a line.")
    prompts = read_prompts(config.prompts_file)
    styles = style_names(config, root)
    upstream = upstream_of(root, trained, (*styles, TRAINING_DATABASE)) | {"prompts": prompts_digest(prompts)}
    stage = f"runs/{trained.name}/evaluate"
    pieces = Pieces(root, stage, fingerprint("evaluate", schema.VERSION, config, upstream))
    if (finished := pieces.manifest()) is not None:
        log.info(f"evaluate: {root.at(stage)} is finished")
        return finished
    sampler = Sampler.open(root, trained, config)
    cells = make_cells(config, config.samples_per_style, styles, prompts)
    sampler.check([request for cell in cells for request in cell.requests])
    judge, reference = train_judge(config, sampler, styles)
    pieces.begin()
    records = draw_cells(sampler, cells, pieces)
    shown = {(cell.mode, cell.style): read_shown(sampler, cell, pieces) for cell in cells}
    result = evaluation(judge, shown, reference, config.seed)
    files = [
        *save_classifier(root, stage, judge),
        root.write_json(f"{stage}/evaluation.json", result),
        root.write_bytes(f"{stage}/bars.png", draw_bars(result)),
        *(root.write_bytes(f"{stage}/{mode}.png", _sheet(mode, cells, pieces)) for mode in MODES),
    ]
    log.info(_line(result))
    return pieces.finish(
        Manifest(
            stage=stage,
            schema_version=schema.VERSION,
            fingerprint=pieces.fingerprint,
            upstream=upstream,
            config=config.model_dump(mode="json"),
            shards=(*records, ShardRecord("report", len(cells), tuple(files))),
            values={**sampler.parts, "styles": list(styles)},
            seconds=time.monotonic() - began,
        )
    )


def style_names(config: EvaluateConfig, root: Root) -> tuple[str, ...]:
    """The styles to compare, sorted unless the recipe orders them. Raises UserError for fewer than two."""
    styles = tuple(dict.fromkeys(config.styles)) or tuple(database_names(root))
    if len(styles) < 2:
        raise UserError(
            f"{root.at('databases')} has {len(styles)} style databases; at least 2 are needed to tell styles "
            "apart. Build them with 'make database'."
        )
    return styles


def train_judge(
    config: EvaluateConfig, sampler: Sampler, styles: Sequence[str]
) -> tuple[TrainedClassifier, Reference]:
    """The classifier on the style databases' own embeddings, and these as the reference for distances."""
    parts: list[Features] = []
    labels = []
    for label, style in enumerate(styles):
        stored = sampler.database(style).embeddings()
        rng = np.random.default_rng([config.seed, *style.encode()])
        kept = np.sort(rng.permutation(len(stored))[: config.reference_rows])
        parts.append(stored[kept].astype(np.float32))
        labels.append(np.full(len(kept), label, np.int64))
    rows: Features = np.concatenate(parts)
    judge = train_classifier(rows, np.concatenate(labels), tuple(styles), config.classifier, config.seed)
    log.info(f"evaluate: judge of {len(styles)} styles  held-out accuracy {judge.held_out_accuracy:.3f}")
    neighbors = config.precision_recall_neighbors
    if len(rows) <= neighbors:
        raise UserError(
            f"the style databases have {len(rows)} pictures in all, too few for precision_recall_neighbors = "
            f"{neighbors}. Lower it or add pictures."
        )
    return judge, Reference(rows, balls(rows, neighbors), neighbors)


def _sheet(mode: str, cells: Sequence[Cell], pieces: Pieces) -> bytes:
    rows = [cell for cell in cells if cell.mode == mode]
    numbers = range(min(SHEET_COLUMNS, len(rows[0].requests)))
    return grid_png(
        Grid(
            cells=[[open_picture(pieces.root, place(cell, pieces, n)) for n in numbers] for cell in rows],
            rows=[style_words(cell.style) for cell in rows],
            columns=[""] * len(numbers),
            title=LABELS[mode],
        )
    )


def _line(result: dict[str, object]) -> str:
    rates = "  ".join(f"{mode} {result[f'style_accuracy_{mode}']:.3f}" for mode in MODES)
    return f"evaluate: taken for the wanted style: {rates}  (chance {result['chance']:.3f})"
