"""`make bench-attribution`: attribution by sampling without a group of pictures, against a model trained without them.

Reads the finished run of a demo's recipe that trains from nothing, such as `jobs/configs/demo_train.toml`. The group is
a style: its rows in the training set and in the training database. Two more models are trained with the recipe's
settings: on all rows with another seed, and without the group, in a copy of the tables from which `optout` removed it.
All models draw the same requests with the same seeds and search the training database. CLIP and autoencoder are the
same for all; they were trained on pictures of the style.
Writes `docs/attribution.json` and `docs/attribution.md`. A repeated call continues the training.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from benchmarks.common.on_recipe import recipe_benchmark_parser, report_on_recipe
from jobs import train
from jobs.cli.recipe import Recipe, load_recipe
from jobs.reporting.estimates import estimate_text
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from jobs.sample import trained_model
from pipeline.optout import optout
from pipeline.web.blocklist import Blocklist
from pipeline.web.urls import canonical_url
from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import image_id
from trainer.attribution import Attribution, attribute
from trainer.evaluation.evaluate import database_rows, style_names, train_feature_judge
from trainer.evaluation.intervals import Bootstrap, share
from trainer.evaluation.recipe import EvaluateConfig
from trainer.evaluation.styles import draw_prompts, style_words
from trainer.recipe import LatentsConfig, TrainConfig
from trainer.sampling.request import TRAINING_DATABASE, Request, read_prompts
from trainer.sampling.sampler import Sampler

Features = npt.NDArray[np.float32]
ALL, SAMPLED, RETRAINED, AGAIN = "all", "sampled_without", "trained_without", "other_seed"
MODELS = {
    ALL: "the model, all rows",
    SAMPLED: "the model, sampled without the group",
    RETRAINED: "trained and sampled without the group",
    AGAIN: "trained on all rows with another seed",
}
KINDS = {"named": "the style of the group", "none": "no style", "other": "another style"}
"""What the prompts name."""
BOOTSTRAP_DRAWS = 1000
MIN_RANGE = 1e-5
"""Distances that differ by less count as equal: the vectors of the same picture differ by rounding."""
SOURCE_FILE = "source.json"
"""In a copy of tables: identities of the stages that it was made from."""

PAGE = """# Attribution against training without the pictures

Written by `make bench-attribution`; the numbers are in `attribution.json`.

**Machine:** {hardware}.

**Model:** `{run}`, {steps:,} steps. The group is the style *{style}*: {rows:,} rows of the metadata. {each} requests
of each kind with different prompts, neighbors from the training database. CLIP and autoencoder know the style always.

The table has the share of the pictures that the judge on CLIP features takes for the style (accuracy of the judge:
{judge_accuracy:.3f}), and the CLIP similarity to the picture of the model with all rows. Another seed of the training
shows what differs without any removal.

{table}

Correlation of the distance (1 - CLIP similarity) that attribution by sampling finds with the distance to the picture
of the model that was trained without the group, over the requests of a kind. It is not defined where one of the two
distances is the same for all requests.

{correlations}
"""


@dataclass(frozen=True)
class Drawn:
    """The pictures of all requests, in order: CLIP features (n, dim) by model, and the share of removed neighbors."""

    features: dict[str, Features]
    removed: npt.NDArray[np.float64]


def style_ids(world: Root, style: str) -> list[int]:
    """Image ids of all rows of the demo's metadata with pictures in a style. Raises UserError if there are none."""
    with world.open("truth.parquet") as file:
        truth = pq.read_table(file, columns=["url", "style"]).filter(pc.field("style") == style_words(style))
    if not len(truth):
        raise UserError(f"{world.at('truth.parquet')} has no row of style {style!r}. Name a style of the demo.")
    return sorted({image_id(canonical_url(url)) for url in truth["url"].to_pylist()})


def changed(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with other settings; `__` in a key stands for a dot."""
    settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_recipe(recipe.path, [*recipe.overrides, *settings])


def copy_folder(recipe: Recipe, style: str) -> Path:
    """The root of the model that is trained without a style."""
    return Path(f"{recipe.root.local_path('')}-without-{style}")


def copy_tables(recipe: Recipe, folder: Path) -> None:
    """Copy the tables of a run into a folder, unless it has them.

    Raises UserError if the folder has those of another state of the run.
    """
    names = (TRAINING_DATABASE, "embed", "neighbors", f"latents/{recipe[LatentsConfig].size}")
    source = {name: read_manifest(recipe.root, name).identity for name in names}
    if folder.exists():
        if Root(folder).find_json(SOURCE_FILE) != source:
            raise UserError(
                f"{folder} was copied from other tables than those of {recipe.root.url}, and its model was trained on"
                " them. Delete the folder and run this command again."
            )
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in names:
        # Links suffice: files are replaced and never changed.
        shutil.copytree(recipe.root.local_path(name), partial / name, copy_function=os.link)
    Root(partial).write_json(SOURCE_FILE, source)
    partial.rename(folder)


def train_without(recipe: Recipe, style: str, ids: Sequence[int]) -> Recipe:
    """Train in the copy of the tables, without the rows. Returns its recipe."""
    folder = copy_folder(recipe, style)
    copy_tables(recipe, folder)
    with ray_connection():
        optout.run(Blocklist(np.array(ids, np.int64)), Root(folder))
    without = changed(recipe, root=folder)
    train.run(without)
    return without


def train_again(recipe: Recipe) -> Recipe:
    """Train on all rows with another seed. Returns its recipe."""
    config = recipe[TrainConfig]
    again = changed(recipe, train__name=f"{config.name}-other-seed", train__seed=config.seed + 1)
    train.run(again)
    return again


def make_requests(recipe: Recipe, style: str, each: int) -> dict[str, list[Request]]:
    """`each` requests of every kind of KINDS, with the same prompts and seeds."""
    config = recipe[EvaluateConfig]
    others = [name for name in style_names(config, recipe.root) if name != style]
    pairs = draw_prompts(read_prompts(config.prompts_file), each, style, config.seed)
    requests: dict[str, list[Request]] = {kind: [] for kind in KINDS}
    for number, (prompt, seed) in enumerate(pairs):
        names = {"named": style, "none": "", "other": others[number % len(others)]}
        for kind, name in names.items():
            text = f"{prompt} in the style of {style_words(name)}" if name else prompt
            requests[kind].append(config.request(text, seed, "text_and_neighbors", TRAINING_DATABASE))
    return requests


def draw(recipes: dict[str, Recipe], requests: Sequence[Request], ids: Sequence[int]) -> Drawn:
    """Draw all requests with every model. recipes: by ALL, RETRAINED and AGAIN."""
    samplers = {
        name: Sampler.open(recipe.root, trained_model(recipe), recipe[EvaluateConfig])
        for name, recipe in recipes.items()
    }
    group = f"image_id in {list(ids)}"
    pairs = [attribute(samplers[ALL], request, group) for request in tqdm(requests, "attribution", unit="request")]
    encode = samplers[ALL].encoder.encode_images
    features = {
        ALL: encode([pair.sample.picture for pair in pairs]),
        SAMPLED: encode([pair.without.picture for pair in pairs]),
        **{name: encode([each.picture for each in samplers[name].sample(requests)]) for name in (RETRAINED, AGAIN)},
    }
    return Drawn(features, np.array([_removed_share(pair) for pair in pairs]))


def _removed_share(pair: Attribution) -> float:
    return len(pair.removed) / max(1, len(pair.sample.neighbors))


def check_options(recipe: Recipe, style: str, each: int) -> None:
    """Raises UserError for a style without a database, unless each request of a kind can have its own prompt, and for
    a model that did not start from nothing.
    """
    config, start = recipe[EvaluateConfig], recipe[TrainConfig].start_from
    if start:
        raise UserError(
            f"{recipe.path} starts the training from {start!r}, which knows the style. Use a recipe without "
            "train.start_from, such as jobs/configs/demo_train.toml."
        )
    names, prompts = style_names(config, recipe.root), read_prompts(config.prompts_file)
    if style not in names:
        raise UserError(f"--style must be one of {', '.join(names)}, got {style!r}")
    if not 2 <= each <= len(prompts):
        raise UserError(f"--each must be from 2 to {len(prompts)}, the prompts of {config.prompts_file}; got {each}")


def correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float | None:
    """Pearson's correlation of two series of distances (n,); None if one of them is constant."""
    if min(np.ptp(first), np.ptp(second)) < MIN_RANGE:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def measure(recipe: Recipe, style: str, each: int) -> dict[str, Any]:
    """Train the two other models if they are not finished, draw and judge."""
    check_options(recipe, style, each)
    ids = style_ids(recipe.root.child("world"), style)
    requests = make_requests(recipe, style, each)
    recipes = {ALL: recipe, RETRAINED: train_without(recipe, style, ids), AGAIN: train_again(recipe)}
    drawn = draw(recipes, [request for part in requests.values() for request in part], ids)
    config = recipe[EvaluateConfig]
    sampler = Sampler.open(recipe.root, trained_model(recipe), config)
    judge = train_feature_judge(config, database_rows(config, sampler, style_names(config, recipe.root)))
    label = judge.network.styles.index(style)
    similarities = {name: (rows * drawn.features[ALL]).sum(axis=1) for name, rows in drawn.features.items()}
    bootstrap, rows = Bootstrap(BOOTSTRAP_DRAWS, config.seed), []
    for number, kind in enumerate(KINDS):
        part = slice(number * each, (number + 1) * each)
        values: dict[str, Any] = {"kind": kind, "removed": float(drawn.removed[part].mean())}
        for name, features in drawn.features.items():
            flags = np.argmax(judge.network.logits(features[part]), axis=1) == label
            values[name] = {"style": share(flags), "similarity": bootstrap.mean(similarities[name][part])}
        values["correlation"] = correlation(*(1 - similarities[name][part] for name in (SAMPLED, RETRAINED)))
        rows.append(values)
    return {
        "hardware": hardware(),
        "run": trained_model(recipe).folder,
        "steps": recipe[TrainConfig].steps,
        "style": style_words(style),
        "rows": len(ids),
        "each": each,
        "judge_accuracy": judge.held_out_accuracy,
        "kinds": rows,
    }


def page(result: dict[str, Any]) -> str:
    headings = ["the prompt names", "neighbors removed:", "", "taken for the style:", "CLIP similarity:"]
    correlations = [[KINDS[row["kind"]], _correlation_text(row["correlation"])] for row in result["kinds"]]
    return PAGE.format(
        **result,
        table=markdown_table(headings, [*_table_rows(result["kinds"])]),
        correlations=markdown_table(["the prompt names", "correlation:"], correlations),
    )


def _correlation_text(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _table_rows(kinds: Iterable[dict[str, Any]]) -> Iterable[list[str]]:
    for row in kinds:
        for name, label in MODELS.items():
            first = [KINDS[row["kind"]], f"{row['removed']:.0%}"] if name == ALL else ["", ""]
            similarity = "1" if name == ALL else estimate_text(row[name]["similarity"])
            yield [*first, label, estimate_text(row[name]["style"]), similarity]


def main() -> None:
    parser = recipe_benchmark_parser("training.attribution", __doc__, "recipe of a finished run of the demo")
    parser.add_argument("--style", default="watercolor", help="name of a style database, the group (watercolor)")
    parser.add_argument("--each", type=int, default=20, help="requests of each kind, 2 to the number of prompts")
    report_on_recipe(parser, "attribution", lambda recipe, options: measure(recipe, options.style, options.each), page)


if __name__ == "__main__":
    main()
