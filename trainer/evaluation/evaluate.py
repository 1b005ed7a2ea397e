"""evaluate: measures whether another database gives another style (paper section 2.2, appendix C).

Reads `runs/<name>/train`, the style databases and `index`. Writes, below `runs/<name>/evaluate/`, the samples of each
mode and style with their CLIP features, the style classifier, `evaluation.json`, `bars.png` and a contact sheet of each
mode. All modes share prompts and seeds, so they differ only in how the style is requested.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np

from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from trainer.evaluation.charts import LABELS, draw_bars
from trainer.evaluation.classifier import TrainedClassifier, save_classifier, train_classifier
from trainer.evaluation.metrics import Features, fit_manifold
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.sample_groups import draw_groups, picture_path, read_features
from trainer.evaluation.scores import Reference, evaluation
from trainer.evaluation.styles import MODES, StyleGroup, make_style_groups, style_words
from trainer.sampling.picture import Grid, grid_png, open_picture
from trainer.sampling.request import TRAINING_DATABASE, prompts_digest, read_prompts
from trainer.sampling.resumable import ResumableItems
from trainer.sampling.sampler import Sampler, TrainedModel, database_names, upstream_fingerprints

log = logging.getLogger("evaluate")

SHEET_COLUMNS = 8


def run(config: EvaluateConfig, trained: TrainedModel, root: Root) -> Manifest:
    """Draw samples, classify them and write the results. Finished groups of an earlier run are kept."""
    started = time.monotonic()
    prompts = _prompts(config)
    styles = style_names(config, root)
    databases = upstream_fingerprints(root, trained, (*styles, TRAINING_DATABASE))
    upstream = databases | {"prompts": prompts_digest(prompts)}
    stage = f"runs/{trained.name}/evaluate"
    items = ResumableItems(root, stage, config, upstream)
    if (finished := items.finished_manifest()) is not None:
        log.info(f"evaluate: {root.at(stage)} is finished")
        return finished
    sampler = Sampler.open(root, trained, config)
    groups = make_style_groups(config, config.samples_per_style, styles, prompts)
    sampler.check([request for group in groups for request in group.requests])
    classifier, reference = train_style_classifier(config, sampler, styles)
    items.begin()
    records = draw_groups(sampler, groups, items)
    features = {(group.mode, group.style): read_features(sampler, group, items) for group in groups}
    result = evaluation(classifier, features, reference, config.seed)
    files = [
        *save_classifier(root, stage, classifier),
        root.write_json(f"{stage}/evaluation.json", result),
        root.write_bytes(f"{stage}/bars.png", draw_bars(result)),
        *(root.write_bytes(f"{stage}/{mode}.png", _contact_sheet(mode, groups, items)) for mode in MODES),
    ]
    log.info(_summary_line(result))
    records.append(ShardRecord("report", len(groups), tuple(files)))
    values = {**sampler.model_identity, "styles": list(styles)}
    return items.finish(records, values, time.monotonic() - started)


def _prompts(config: EvaluateConfig) -> tuple[str, ...]:
    if not config.prompts_file:
        raise UserError("[evaluate] prompts_file is not set. Set it to a text file with one prompt a line.")
    return read_prompts(config.prompts_file)


def style_names(config: EvaluateConfig, root: Root) -> tuple[str, ...]:
    """Styles in the order of the recipe; by default all, sorted. Raises UserError for fewer than 2."""
    styles = tuple(dict.fromkeys(config.styles)) or tuple(database_names(root))
    if len(styles) < 2:
        raise UserError(
            f"{root.at('databases')} has {len(styles)} style databases; the evaluation compares at least 2. "
            "Build them with 'make database'."
        )
    return styles


def train_style_classifier(
    config: EvaluateConfig, sampler: Sampler, styles: Sequence[str]
) -> tuple[TrainedClassifier, Reference]:
    """Train the classifier on embeddings of the style databases; they are also the reference of distances."""
    parts: list[Features] = []
    labels = []
    for label, style in enumerate(styles):
        embeddings = sampler.database(style).embeddings()
        rng = np.random.default_rng([config.seed, *style.encode()])
        selected = np.sort(rng.permutation(len(embeddings))[: config.reference_rows_per_style])
        parts.append(embeddings[selected].astype(np.float32))
        labels.append(np.full(len(selected), label, np.int64))
    rows: Features = np.concatenate(parts)
    classifier = train_classifier(rows, np.concatenate(labels), tuple(styles), config.classifier, config.seed)
    accuracy = classifier.held_out_accuracy
    log.info(f"evaluate: classifier of {len(styles)} styles  held-out accuracy {accuracy:.3f}")
    neighbors = config.precision_recall_neighbors
    if len(rows) <= neighbors:
        raise UserError(
            f"the style databases have {len(rows)} pictures in all, too few for precision_recall_neighbors = "
            f"{neighbors}. Lower it or add pictures."
        )
    return classifier, Reference(rows, fit_manifold(rows, neighbors), neighbors)


def _contact_sheet(mode: str, groups: Sequence[StyleGroup], items: ResumableItems) -> bytes:
    rows = [group for group in groups if group.mode == mode]
    numbers = range(min(SHEET_COLUMNS, len(rows[0].requests)))
    cells = [[open_picture(items.root, picture_path(row, items, n)) for n in numbers] for row in rows]
    return grid_png(Grid(cells, [style_words(row.style) for row in rows], [""] * len(numbers), LABELS[mode]))


def _summary_line(result: dict[str, object]) -> str:
    rates = "  ".join(f"{mode} {result[f'style_accuracy_{mode}']:.3f}" for mode in MODES)
    return f"evaluate: classified as the requested style: {rates}  (chance {result['chance']:.3f})"
