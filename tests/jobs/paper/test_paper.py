"""`make paper` on a root as training leaves it, small: the stage, its page, and the manual's page."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.cli.recipe import load_recipe
from jobs.paper.page import verdicts, write_docs, write_page
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root
from tests.trainer.tiny_run import DIM, PROMPTS, STYLES, write_run
from trainer.evaluation.paper.experiments import Subject, run
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.recipe import Training
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import ClassifierConfig, EvaluateConfig
from trainer.sampling.sampler import open_database

STAGE = "runs/tiny/paper"
NAMES = tuple(sorted(STYLES))
CONFIG = PaperConfig(
    prompts=("a star", "two circles"),
    pictures_per_prompt=2,
    retrieval_queries=4,
    bootstrap_draws=100,
    closest_pairs=3,
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> tuple[Root, Subject]:
    """A finished run whose training set is gone but for the embeddings, as of a released model."""
    folder = tmp_path_factory.mktemp("paper")
    root, trained = write_run(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rows = np.random.default_rng(0).standard_normal((6, DIM))
    table = pa.table(
        {
            schema.IMAGE_ID: np.arange(6),
            schema.EMBEDDING: schema.fixed_lists((rows / 6).astype(np.float16)),
        }
    )
    wanted = pa.schema([table.schema.field(0).with_nullable(False), *list(table.schema)[1:]])
    schema.write_table(root, "embed/train/00000.parquet", table.cast(wanted), wanted)
    train = {"name": "tiny", "source": "latents", "size": 32, "k": 4, "steps": 1}
    train |= {"global_batch": 2, "micro_batch": 2}
    model = {"latent_channels": 4, "context_dim": DIM, "channels": [32, 32], "attention": [2], "layers": 1}
    autoencoder = trained.autoencoder.model_dump()
    sections = {"model": model, "diffusion": {}, "autoencoder": autoencoder, "train": train}
    evaluate = EvaluateConfig(
        prompts_file=str(folder / "prompts.txt"),
        samples_per_style=4,
        classifier=ClassifierConfig(hidden=32, epochs=40),
        steps=2,
        guidance=2.0,
        k=4,
        batch_size=4,
        workers=1,
        threads=1,
        device="cpu",
    )
    return root, Subject(trained, Training.model_validate(sections), evaluate)


@pytest.fixture(scope="module")
def finished(subject):
    root, about = subject
    manifest = run(CONFIG, about, root)
    return root, manifest, root.read_json(f"{STAGE}/paper.json")


def test_every_figure_and_experiment_stands_on_disk(finished):
    _, manifest, found = finished
    charts = ("improvement", "modes", "distances", "times", "swap", "styles", "samples")
    for name in charts:
        assert f"{STAGE}/{name}.png" in manifest.checksums()
    assert set(found) == {"asked", "sheets", "tables", "held_out", "copying", "times"}
    assert [one["database"] for one in found["times"]] == [*NAMES, "index"]
    assert [one["rows"] for one in found["times"]] == [24, 24, 24, 72]
    assert [one["name"] for one in found["copying"]] == ["neighbors_clip", "training_clip"]
    assert "neighbors" in found["held_out"]["left_out"]
    assert found["tables"]["modes"]["shuffled"]["samples"] == 12


def test_figures_compare_pictures_of_one_prompt_and_seed(finished):
    root = finished[0]
    asked = []
    for n in range(4):
        with root.open(f"{STAGE}/samples/figures/swap/{n:04d}.png") as file:
            recipe = read_recipe(file.read())
        asked.append((recipe["prompt"], recipe["seed"], recipe["database"]))
    star, circles = CONFIG.prompts
    first, second = NAMES[:2]
    assert asked == [(star, 0, first), (circles, 0, first), (star, 0, second), (circles, 0, second)]


def test_a_control_asks_the_evaluations_requests_with_neighbors_of_elsewhere(finished):
    root = finished[0]
    recipes = []
    for place in ("evaluate/samples/retrieval", "paper/samples/shuffled", "paper/samples/other_prompt"):
        with root.open(f"runs/tiny/{place}/green/0001.png") as file:
            recipes.append(read_recipe(file.read()))
    evaluated, shuffled, other = recipes
    for recipe in (shuffled, other):
        assert (recipe["prompt"], recipe["seed"]) == (evaluated["prompt"], evaluated["seed"])
    green = set(root_ids(root, "green"))
    assert green >= {one for one, _ in other["neighbors"]}
    assert not green & {one for one, _ in shuffled["neighbors"]}
    assert len(shuffled["neighbors"]) == 4


def root_ids(root: Root, style: str) -> list[int]:
    return open_database(root, style).metadata()[schema.IMAGE_ID].to_pylist()


def test_a_killed_run_goes_on_and_ends_with_the_same_samples(finished, subject):
    root, manifest, _ = finished
    place = root.local_path(f"{STAGE}/samples/shuffled/green/0000.png")
    before = place.stat().st_mtime_ns
    run(CONFIG, subject[1], root)
    assert place.stat().st_mtime_ns == before
    root.delete(f"{STAGE}/manifest.json")
    root.delete(f"{STAGE}/records/random_rows/green.json")
    root.delete(f"{STAGE}/records/tables.json")
    again = run(CONFIG, subject[1], root)
    assert again.checksums() == manifest.checksums()
    assert place.stat().st_mtime_ns == before


def test_the_page_carries_its_pictures_and_asks_nothing_of_the_network(finished):
    root = finished[0]
    page = write_page(root, STAGE)
    html = root.local_path(f"{STAGE}/report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len([one for one in sources if one.startswith("data:image/")]) == len(page.pictures) == 9
    assert all(one.startswith(("data:image/", "#")) for one in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", html)
    assert "Not measured." in html
    for one in page.verdicts:
        assert one.measured in html


def test_the_manuals_page_names_the_pictures_beside_it(finished, tmp_path: Path):
    root = finished[0]
    path = write_docs(root, write_page(root, STAGE), tmp_path)
    named = re.findall(r"\]\((images/[^)]*)\)", path.read_text())
    assert sorted(named) == sorted(f"images/{one.name}" for one in (tmp_path / "images").iterdir())
    facts = json.loads((tmp_path / "paper.json").read_text())
    assert facts["tables"]["chance"] == pytest.approx(1 / 3)
    assert len(facts["verdicts"]) == 7


def test_a_control_that_keeps_the_style_is_a_missed_verdict(finished):
    found = json.loads(json.dumps(finished[2]))
    found["tables"]["modes"]["shuffled"]["accuracy"] = [0.9, 0.8, 0.95]
    found["tables"]["effect"]["no_neighbors"] = [0.5, 0.4, 0.6]
    found["copying"][0]["share_nearer"] = [0.2, 0.1, 0.3]
    by_name = {one.about: one.met for one in verdicts(found)}
    assert by_name["Samples taken for their database's style, over no neighbors"]
    assert not by_name["Negative control: neighbors of another style and prompt"]
    assert not by_name["Samples nearer to their own neighbors, CLIP than 99% of real images to another"]


def test_a_page_of_unfinished_experiments_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="paper did not finish"):
        write_page(Root(tmp_path), STAGE)


def test_the_demos_recipe_names_styles_that_its_world_draws():
    recipe = load_recipe(Path("jobs/configs/demo.toml"))
    config, styles = recipe[PaperConfig], recipe[EvaluateConfig].styles
    assert set(config.swap) <= set(styles)
