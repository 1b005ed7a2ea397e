"""The paper's experiments on a root with a tiny trained model: stage, report and documentation page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli.recipe import load_recipe
from jobs.demo.world.styles import UNKNOWN_STYLES
from jobs.paper.page import default_line, verdicts, write_docs, write_page
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root
from tests.trainer.tiny_run import DIM, PROMPTS, STYLES, pictures_of, write_run, write_style_database
from trainer.evaluation.paper.experiments import ModelUnderTest, run
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.recipe import ClassifierConfig, EvaluateConfig, PixelClassifierConfig
from trainer.evaluation.styles import style_words
from trainer.recipe import TrainingRecipe
from trainer.sampling.picture import read_recipe
from trainer.sampling.sampler import open_database

STAGE = "runs/tiny/paper"
NAMES = tuple(sorted(STYLES))
CONFIG = PaperConfig(
    prompts=("a star", "two circles"),
    pictures_per_prompt=2,
    retrieval_queries=4,
    bootstrap_draws=100,
    closest_pairs=3,
    tradeoff_guidance=(1.0, 2.0),
    tradeoff_samples=2,
)
MINE = "my_own"
"""A style database that the evaluation does not have, with pictures of two of its styles."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Root, ModelUnderTest]:
    """A finished run with embeddings but without its training set, as for a released model."""
    folder = tmp_path_factory.mktemp("paper")
    root, trained = write_run(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write_style_database(root, f"databases/{MINE}", Encoder(trained.clip), ["green", "deep_red"], 12)
    write_judge_pictures(root.local_path("judge.parquet"))
    rows = np.random.default_rng(0).standard_normal((6, DIM))
    table = pa.table(
        {schema.IMAGE_ID: np.arange(6), schema.EMBEDDING: schema.fixed_lists((rows / 6).astype(np.float16))}
    )
    table_schema = pa.schema([table.schema.field(0).with_nullable(False), *list(table.schema)[1:]])
    schema.write_table(root, "embed/train/00000.parquet", table.cast(table_schema), table_schema)
    train = {"name": "tiny", "source": "latents", "size": 32, "k": 4, "steps": 1}
    train |= {"global_batch": 2, "micro_batch": 2}
    unet = {"latent_channels": 4, "context_dim": DIM, "channels": [32, 32], "attention": [2], "layers": 1}
    autoencoder = trained.autoencoder.model_dump()
    sections = {"model": unet, "diffusion": {}, "autoencoder": autoencoder, "train": train}
    evaluate = EvaluateConfig(
        prompts_file=str(folder / "prompts.txt"),
        styles=NAMES,
        samples_per_style=4,
        classifier=ClassifierConfig(hidden=32, epochs=40),
        pixel_classifier=PixelClassifierConfig(epochs=1),
        steps=2,
        guidance=2.0,
        k=4,
        batch_size=4,
        workers=1,
        threads=1,
        device="cpu",
    )
    return root, ModelUnderTest(trained, TrainingRecipe.model_validate(sections), evaluate)


def write_judge_pictures(table: Path) -> None:
    """Pictures of the evaluation's styles and of MINE for a judge on pixels."""
    rows = []
    for style in (*NAMES, MINE):
        for number, picture in enumerate(pictures_of("green" if style == MINE else style, 10)):
            picture.save(table.with_name(f"{style}-{number}.png"))
            rows.append({"path": f"{style}-{number}.png", "style": style})
    pq.write_table(pa.Table.from_pylist(rows), table)


def settings_of(root: Root) -> PaperConfig:
    table = str(root.local_path("judge.parquet"))
    return CONFIG.model_copy(update={"unknown_styles": (MINE,), "unknown_judge_pictures": table})


@pytest.fixture(scope="module")
def finished(model):
    root, tested = model
    manifest = run(settings_of(root), tested, root)
    return root, manifest, root.read_json(f"{STAGE}/paper.json")


def test_every_figure_and_experiment_is_stored(finished):
    _, manifest, results = finished
    charts = ("improvement", "modes", "distances", "times", "tradeoff", "swap", "styles", "samples", "unknown_styles")
    for name in charts:
        assert f"{STAGE}/{name}.png" in manifest.checksums()
    experiments = {"sheets", "tables", "held_out", "copying", "times", "tradeoff", "unknown_styles"}
    assert set(results) == {"asked", *experiments}
    assert [(row["guidance"], row["k"]) for row in results["tradeoff"]["settings"]] == [(1.0, 4), (2.0, 4)]
    assert [row["database"] for row in results["times"]] == [*NAMES, "index"]
    assert [row["rows"] for row in results["times"]] == [24, 24, 24, 72]
    assert [row["name"] for row in results["copying"]] == ["database_clip", "training_clip"]
    assert "neighbors" in results["held_out"]["left_out"]
    assert results["tables"]["modes"]["shuffled"]["samples"] == 12


def test_figures_compare_databases_with_equal_prompt_and_seed(finished):
    root = finished[0]
    cells = []
    for n in range(4):
        with root.open(f"{STAGE}/samples/figures/swap/{n:04d}.png") as file:
            recipe = read_recipe(file.read())
        cells.append((recipe["prompt"], recipe["seed"], recipe["database"]))
    star, circles = CONFIG.prompts
    first, second = NAMES[:2]
    assert cells == [(star, 0, first), (circles, 0, first), (star, 0, second), (circles, 0, second)]


def test_a_control_has_the_requests_of_the_evaluation_with_other_neighbors(finished):
    root = finished[0]
    recipes = []
    for folder in ("evaluate/samples/retrieval", "paper/samples/shuffled", "paper/samples/other_prompt"):
        with root.open(f"runs/tiny/{folder}/green/0001.png") as file:
            recipes.append(read_recipe(file.read()))
    evaluated, shuffled, other = recipes
    for recipe in (shuffled, other):
        assert (recipe["prompt"], recipe["seed"]) == (evaluated["prompt"], evaluated["seed"])
    green = set(database_ids(root, "green"))
    assert green >= {id_ for id_, _ in other["neighbors"]}
    assert not green & {id_ for id_, _ in shuffled["neighbors"]}
    assert len(shuffled["neighbors"]) == 4


def database_ids(root: Root, style: str) -> list[int]:
    return open_database(root, style).metadata()[schema.IMAGE_ID].to_pylist()


def test_an_unknown_style_is_measured_in_all_modes_by_judges_that_know_it(finished):
    root, _, results = finished
    unknown = results["unknown_styles"]
    assert [row["style"] for row in unknown["styles"]] == [MINE]
    assert unknown["chance"] == 1 / 4
    assert set(unknown["modes"]) == {"retrieval", "suffix", "suffix_retrieval", "no_neighbors"}
    assert [row["samples"] for row in unknown["modes"].values()] == [4] * 4
    assert unknown["judges"]["pixels"]["held_out_rows"] == 8
    assert set(unknown["effect"]) == set(unknown["effect_pixels"]) == set(unknown["modes"]) - {"retrieval"}
    recipes = {}
    for mode in unknown["modes"]:
        with root.open(f"{STAGE}/samples/{mode}/{MINE}/0000.png") as file:
            recipes[mode] = read_recipe(file.read())
    prompt = recipes["retrieval"]["prompt"]
    assert (prompt in PROMPTS, recipes["retrieval"]["database"]) == (True, MINE)
    assert recipes["suffix"]["prompt"] == f"{prompt} in the style of my own"
    assert recipes["suffix_retrieval"]["database"] == "index"
    # The tables of the other styles do not have it.
    assert [row["style"] for row in results["tables"]["styles"]] == list(NAMES)
    assert results["tables"]["judges"]["pixels"] is None


def test_an_unknown_style_that_the_evaluation_has_is_refused(model):
    config = CONFIG.model_copy(update={"unknown_styles": ("green",)})
    with pytest.raises(UserError, match=r"paper.unknown_styles has 'green', a style of \[evaluate\]"):
        run(config, model[1], model[0])


def test_a_killed_run_resumes_and_ends_with_the_same_samples(finished, model):
    root, manifest, _ = finished
    path = root.local_path(f"{STAGE}/samples/shuffled/green/0000.png")
    before = path.stat().st_mtime_ns
    run(settings_of(root), model[1], root)
    assert path.stat().st_mtime_ns == before
    root.delete(f"{STAGE}/manifest.json")
    root.delete(f"{STAGE}/records/random_rows/green.json")
    root.delete(f"{STAGE}/records/tables.json")
    resumed = run(settings_of(root), model[1], root)
    assert resumed.checksums() == manifest.checksums()
    assert path.stat().st_mtime_ns == before


def test_the_report_embeds_its_pictures_and_loads_nothing_from_the_network(finished):
    root = finished[0]
    page = write_page(root, STAGE)
    html = root.local_path(f"{STAGE}/report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len([source for source in sources if source.startswith("data:image/")]) == len(page.pictures) == 11
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", html)
    assert "Not measured." in html
    assert default_line(page.results) in html
    for verdict in page.verdicts:
        assert verdict.measured in html


def test_the_documentation_page_links_the_pictures_that_are_written(finished, tmp_path: Path):
    root = finished[0]
    path = write_docs(root, write_page(root, STAGE), tmp_path)
    links = re.findall(r"\]\((images/[^)]*)\)", path.read_text())
    assert sorted(links) == sorted(f"images/{file.name}" for file in (tmp_path / "images").iterdir())
    values = json.loads((tmp_path / "paper.json").read_text())
    assert values["tables"]["chance"] == pytest.approx(1 / 3)
    assert len(values["verdicts"]) == 12
    assert "**Two baselines** name the style" in path.read_text()


def test_the_pages_state_every_setting_of_the_samples(finished, tmp_path: Path):
    root, _, values = finished
    stored = {"neighbor_weight": 1.0, "guidance_interval": [0.0, 1.0], "negative_prompt": "", "height": 0, "width": 0}
    assert values["asked"].items() >= stored.items()
    changed = {"neighbor_weight": 0.5, "guidance_interval": [0.2, 0.8], "negative_prompt": "fog", "width": 64}
    page = write_page(root, STAGE)
    page = replace(page, results=page.results | {"asked": values["asked"] | changed})
    text = write_docs(root, page, tmp_path).read_text()
    line = "4 neighbors of weight 0.5, guidance 2 at noise levels 0.2 to 0.8, negative prompt “fog”, 2 steps of ddim, "
    assert line + "64 x the training size pixels." in text
    assert ", 4 neighbors, guidance 2, 2 steps of ddim." in root.local_path(f"{STAGE}/report.html").read_text()


def test_a_control_that_keeps_the_style_is_a_missed_verdict(finished):
    results = json.loads(json.dumps(finished[2]))
    results["tables"]["modes"]["shuffled"]["accuracy"] = [0.9, 0.8, 0.95]
    results["tables"]["effect"]["no_neighbors"] = [0.5, 0.4, 0.6]
    results["copying"][0]["share_nearer"] = [0.2, 0.1, 0.3]
    by_name = {verdict.about: verdict.met for verdict in verdicts(results)}
    assert by_name["Style accuracy with the database's neighbors, gain over no neighbors"]
    assert not by_name["Negative control: neighbors of another style and prompt"]
    assert not by_name["Share of samples nearer than 99% of real images: to the nearest row of their database, CLIP"]


def test_a_verdict_is_missed_only_if_its_interval_says_so(finished):
    results = json.loads(json.dumps(finished[2]))
    first_baseline = (
        "Style accuracy with the database's neighbors, gain over the style named in the prompt, with neighbors of"
    )
    for estimate, met in (([0.01, -0.005, 0.03], False), ([0.02, 0.001, 0.04], True)):
        results["tables"]["effect"]["suffix_retrieval"] = estimate
        first = verdicts(results)[0]
        assert first.about.startswith(first_baseline)
        assert first.met == met
    results["tables"]["modes"]["random_rows"]["accuracy"] = [0.6, 0.45, 0.7]  # the limit is 0.5
    by_name = {verdict.about: verdict.met for verdict in verdicts(results)}
    assert by_name["Negative control: random rows of the training database"]


def test_without_a_curve_and_unknown_styles_the_pages_have_none(finished, tmp_path: Path):
    page = write_page(finished[0], STAGE)
    optional = ("tradeoff", "unknown_styles")
    results = {name: values for name, values in page.results.items() if name not in optional}
    text = write_docs(finished[0], replace(page, results=results), tmp_path).read_text()
    assert default_line(results) == ""
    assert "Style against content" not in text
    assert "Styles that no caption names" not in text
    assert len(verdicts(results)) == 8


def test_each_judge_has_its_own_stronger_baseline(finished, tmp_path: Path):
    root = finished[0]
    page = write_page(root, STAGE)
    results = json.loads(json.dumps(page.results))
    tables, unknown = results["tables"], results["unknown_styles"]
    tables["judges"]["pixels"] = unknown["judges"]["pixels"]
    tables["effect"] |= {"suffix": [0.3, 0.2, 0.4], "suffix_retrieval": [0.2, 0.1, 0.3]}
    tables["effect_pixels"] = {"suffix": [0.05, -0.05, 0.15], "suffix_retrieval": [0.6, 0.5, 0.7]}
    text = " ".join(write_docs(root, replace(page, results=results), tmp_path).read_text().split())
    assert "stronger one, the style named in the prompt, with neighbors of the training database: 0.200" in text
    assert "By a judge that sees only pixels, the stronger one is the style named in the prompt: 0.050" in text


def without(values, names: set[str]):
    """A value of JSON without some names, at any depth."""
    if isinstance(values, dict):
        return {name: without(value, names) for name, value in values.items() if name not in names}
    return [without(value, names) for value in values] if isinstance(values, list) else values


def pages_of(finished, stored: dict, folder: Path):
    """The page of these experiments, as HTML, and as Markdown, which is written below a folder."""
    root, _, values = finished
    root.write_json(f"{STAGE}/paper.json", stored)
    try:
        page = write_page(root, STAGE)
        html = root.local_path(f"{STAGE}/report.html").read_text()
    finally:
        root.write_json(f"{STAGE}/paper.json", values)
    return page, html, write_docs(root, page, folder).read_text()


def test_experiments_of_a_version_without_descriptor_and_weights_have_both_pages(finished, tmp_path: Path):
    earlier = without(finished[2], {"descriptor", "accuracy_nearest", "content_and_style", "neighbor_weight"})
    for row in earlier["unknown_styles"]["styles"] + earlier["tables"]["styles"]:
        del row["retrieval"]
    page, html, text = pages_of(finished, earlier, tmp_path)
    assert "neighbor_weight = 1" in default_line(page.results)
    assert "Nearest picture: the share" not in text
    assert "by pixels</th>" in html
    assert not {"by nearest picture", "content and style"} & set(re.findall(r">([^<>]+)</th>", html))


def test_the_distance_to_held_out_pictures_is_a_column_where_it_was_measured(finished, tmp_path: Path):
    values = finished[2]
    measured = json.loads(json.dumps(values))
    for row in measured["tables"]["modes"].values():
        row["kernel_distance_held_out"] = [7.1234, 7.1, 7.2]
    tables = []
    for stored in (without(values, {"kernel_distance_held_out"}), values, measured):
        _, html, text = pages_of(finished, stored, tmp_path)
        assert ("7.123<br>" in html) == ("to held-out pictures</th>" in html) == (stored is measured)
        lines = text[text.index("| mode | accuracy | by pixels | by nearest picture | logit") :].split("\n\n")[0]
        tables.append(lines.splitlines())
        assert {line.count("|") for line in tables[-1][:3]} == {12 if stored is measured else 11}
    assert tables[0] == tables[1]
    assert "to held-out pictures" in tables[2][0]
    assert "7.123" in tables[2][2].split("|")[7]


def test_a_report_of_unfinished_experiments_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="paper did not finish"):
        write_page(Root(tmp_path), STAGE)


def test_the_demo_recipe_swaps_two_of_its_styles_and_measures_the_unknown_ones():
    recipe = load_recipe(Path("jobs/configs/demo.toml"))
    config, styles = recipe[PaperConfig], recipe[EvaluateConfig].styles
    assert set(config.swapped_databases) <= set(styles)
    assert tuple(style_words(style) for style in config.unknown_styles) == UNKNOWN_STYLES
