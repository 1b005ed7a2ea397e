"""evaluate: measures whether another database gives another style (paper section 2.2, appendix C).

Reads `runs/<name>/train`, the style databases, `index` and the pictures of the judge on pixels. Writes, below
`runs/<name>/evaluate/`, the samples of each mode and style with their CLIP features, the style classifiers,
`evaluation.json`, `bars.png` and a contact sheet of each mode. All modes share prompts and seeds, so they differ only
in how the style is requested.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrieval.clip.encoder import Encoder
from retrieval.database.verify import visible_positions
from retrieval.errors import UserError
from retrieval.pictures.picture_file import read_picture
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.writable import require_writable
from trainer.evaluation.charts import LABELS, draw_bars
from trainer.evaluation.classifier import TrainedClassifier, save_classifier, train_classifier
from trainer.evaluation.intervals import Bootstrap
from trainer.evaluation.metrics import Features
from trainer.evaluation.pixel_judge import JudgePictures, pictures_digest, train_pixel_judge
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.sample_groups import draw_groups, features_by_group, picture_path
from trainer.evaluation.scores import Evaluator, Reference, results
from trainer.evaluation.style_descriptor import train_style_descriptor
from trainer.evaluation.styles import (
    MODES,
    StyleGroup,
    make_style_groups,
    require_read_styles,
    stronger_baseline,
    style_words,
)
from trainer.sampling.picture import Grid, grid_png, open_picture
from trainer.sampling.request import TRAINING_DATABASE, prompts_digest, read_prompts
from trainer.sampling.resumable import Distribute, Part, ResumableItems, draw_alone
from trainer.sampling.sampler import Sampler, TrainedModel, database_names, upstream_fingerprints

log = logging.getLogger("evaluate")

SHEET_COLUMNS = 8
BOOTSTRAP_DRAWS = 1000


def run(config: EvaluateConfig, trained: TrainedModel, root: Root, distribute: Distribute = draw_alone) -> Manifest:
    """Draw samples, classify them and write the results. Finished groups of an earlier run are kept.

    distribute: lets other processes draw parts, which call `draw_part`.
    """
    started = time.monotonic()
    prompts = _prompts(config)
    items = _items(config, trained, root, prompts)
    stage, styles = items.stage, style_names(config, root)
    if (finished := items.finished_manifest()) is not None:
        log.info(f"evaluate: {root.at(stage)} is finished")
        return finished
    sampler, groups = _open(config, trained, root, prompts)
    require_writable(root, f"{stage}/manifest.json")
    evaluator = make_evaluator(config, sampler, styles, Bootstrap(BOOTSTRAP_DRAWS, config.seed))
    with items.building():
        distribute(lambda part: draw_groups(sampler, part.of(groups), items))
        records = draw_groups(sampler, groups, items)
        result = results(features_by_group(sampler, groups, items), evaluator)
        files = [
            *save_classifier(root, f"{stage}/classifier", evaluator.classifier),
            *(
                save_classifier(root, f"{stage}/pixel_classifier", judge)
                if (judge := evaluator.pixel_classifier)
                else ()
            ),
            root.write_json(f"{stage}/evaluation.json", result),
            root.write_bytes(f"{stage}/bars.png", draw_bars(result)),
            *(root.write_bytes(f"{stage}/{mode}.png", _contact_sheet(mode, groups, items)) for mode in MODES),
        ]
        log.info(_summary_line(result))
        records.append(ShardRecord("report", len(groups), tuple(files)))
        values = {**sampler.model_identity, "styles": list(styles)}
        return items.finish(records, values, time.monotonic() - started)


def draw_part(config: EvaluateConfig, trained: TrainedModel, root: Root, part: Part) -> None:
    """Draw a part of the groups of a stage that `run` has begun in another process.

    Raises UserError if that process began it with other settings, inputs or prompts.
    """
    prompts = _prompts(config)
    items = _items(config, trained, root, prompts)
    items.require_begun()
    sampler, groups = _open(config, trained, root, prompts)
    draw_groups(sampler, part.of(groups), items)


def _items(config: EvaluateConfig, trained: TrainedModel, root: Root, prompts: Sequence[str]) -> ResumableItems:
    databases = upstream_fingerprints(root, trained, (*style_names(config, root), TRAINING_DATABASE))
    upstream = databases | {"prompts": prompts_digest(prompts)}
    if config.judge_pictures:
        upstream["judge_pictures"] = pictures_digest(config.judge_pictures)
    return ResumableItems(root, f"runs/{trained.name}/evaluate", config, upstream)


def _open(
    config: EvaluateConfig, trained: TrainedModel, root: Root, prompts: Sequence[str]
) -> tuple[Sampler, list[StyleGroup]]:
    """Load the model and make the groups. Raises UserError for requests that it cannot serve."""
    sampler = Sampler.open(root, trained, config)
    styles = style_names(config, root)
    groups = make_style_groups(config, config.samples_per_style, styles, prompts, config.prompts_per_style)
    sampler.check([request for group in groups for request in group.requests])
    require_read_styles(groups, sampler.encoder.truncated)
    return sampler, groups


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


def make_evaluator(config: EvaluateConfig, sampler: Sampler, styles: Sequence[str], bootstrap: Bootstrap) -> Evaluator:
    """Train the judges. Rows of the style databases train one and are the reference of distances; pictures of the judge
    on pixels, which are in no database, are a second reference.

    The style descriptor is trained on pictures of the styles of the recipe, which `styles` may exceed.
    """
    rows = database_rows(config, sampler, styles)
    count, neighbors = sum(map(len, rows.values())), config.precision_recall_neighbors
    if count <= neighbors:
        raise UserError(
            f"the style databases have {count} pictures in all, too few for precision_recall_neighbors = "
            f"{neighbors}. Lower it or add pictures."
        )
    pixels = gallery = held_out = None
    if config.judge_pictures:
        pictures, known = JudgePictures.read(config, styles), style_names(config, sampler.root)
        pixels = train_pixel_judge(pictures, config.pixel_classifier, config.seed)
        _log_judge("pixels", pixels)
        gallery = train_style_descriptor(pictures, known, config.style_descriptor, config.seed)
        held_out = picture_features(pictures, sampler.encoder)
        found = gallery.retrieval(styles).value
        log.info(f"evaluate: style descriptor of {len(known)} styles  mAP@1 on held-out pictures {found:.3f}")
    reference = Reference.of(rows, neighbors, held_out)
    return Evaluator(train_feature_judge(config, rows), pixels, reference, bootstrap, gallery)


def picture_features(pictures: JudgePictures, encoder: Encoder) -> dict[str, Features]:
    """CLIP features (n, dim) of the pictures of each style, as the features of samples."""
    features = np.concatenate([encoder.encode_images([read_picture(path)]) for path in pictures.paths])
    return {style: features[pictures.labels == label] for label, style in enumerate(pictures.styles)}


def database_rows(config: EvaluateConfig, sampler: Sampler, styles: Sequence[str]) -> dict[str, Features]:
    """CLIP features (n, dim) of random rows of each style database, without hidden rows."""
    rows: dict[str, Features] = {}
    for style in styles:
        database = sampler.database(style)
        embeddings = database.embeddings()[visible_positions(database)]
        rng = np.random.default_rng([config.seed, *style.encode()])
        selected = np.sort(rng.permutation(len(embeddings))[: config.reference_rows_per_style])
        rows[style] = embeddings[selected].astype(np.float32)
    return rows


def train_feature_judge(config: EvaluateConfig, rows: dict[str, Features]) -> TrainedClassifier:
    """The paper's judge, trained on CLIP features (n, dim) of each style."""
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows.values()])
    trained = train_classifier(np.concatenate([*rows.values()]), labels, tuple(rows), config.classifier, config.seed)
    _log_judge("CLIP features", trained)
    return trained


def _log_judge(inputs: str, trained: TrainedClassifier) -> None:
    styles, accuracy = len(trained.network.styles), trained.held_out_accuracy
    log.info(f"evaluate: classifier of {styles} styles on {inputs}  held-out accuracy {accuracy:.3f}")


def _contact_sheet(mode: str, groups: Sequence[StyleGroup], items: ResumableItems) -> bytes:
    rows = [group for group in groups if group.mode == mode]
    numbers = range(min(SHEET_COLUMNS, len(rows[0].requests)))
    cells = [[open_picture(items.root, picture_path(row, items, n)) for n in numbers] for row in rows]
    return grid_png(Grid(cells, [style_words(row.style) for row in rows], [""] * len(numbers), LABELS[mode]))


def _summary_line(result: dict[str, Any]) -> str:
    rates = "  ".join(f"{mode} {result['modes'][mode]['accuracy'].value:.3f}" for mode in MODES)
    baseline = stronger_baseline(result["effect"])
    gain = result["effect"][baseline]
    return (
        f"evaluate: classified as the requested style: {rates}  (chance {result['chance']:.3f}); retrieval minus "
        f"{baseline}: {gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})"
    )
