"""The example notebooks run completely on the tiny demo, in this process."""

import ast
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from PIL import Image

from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.jobs.demo.tiny_demo import TinyDemo, tiny_recipe
from tests.jobs.finetune.test_finetune import in_process

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_cells(name: str, old: str = "", new: str = "") -> list[object]:
    """Check the format and run the code cells in order, as Jupyter does, in this process.

    Returns the values of their expressions. old: text of one cell that is replaced by `new`.
    """
    document = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(document)
    values: list[object] = []
    names: dict[str, object] = {}
    assert not old or sum(old in cell.source for cell in document.cells) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "displayhook", values.append)
        for number, cell in enumerate(document.cells):
            if cell.cell_type == "code":
                assert not cell.outputs, f"{name}: clear all outputs"
                source = cell.source.replace(old, new) if old else cell.source
                statements = ast.Interactive(ast.parse(source).body)
                exec(compile(statements, f"{name}, cell {number}", "single"), names)
    return values


def number_of(kind: type, values: list[object]) -> int:
    return sum(isinstance(value, kind) for value in values)


def test_search_and_filter(
    tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAION_RDM_ROOT", str(tiny_demo.root))
    monkeypatch.setattr(plt, "show", lambda: None)
    values = run_cells("search.ipynb")
    [figure] = plt.get_fignums()
    plt.close(figure)
    assert number_of(Image.Image, values) == 2
    assert number_of(pd.DataFrame, values) == 3
    assert "\n16 pictures drawn" in capsys.readouterr().out


def test_restyle(
    tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny_recipe().replace("runs/demo", str(tiny_demo.root)))
    monkeypatch.setenv("LAION_RDM_RECIPE", str(recipe))
    monkeypatch.chdir(tmp_path)  # the notebook changes the folder
    values = run_cells("restyle.ipynb")
    assert number_of(Image.Image, values) == 5
    printed = capsys.readouterr().out
    assert "; 2 neighbors left out" in printed
    match = re.search(r"largest difference of a pixel: (\d+) of 255", printed)
    assert match
    assert int(match[1]) <= 2


@pytest.mark.usefixtures("ray_cluster")
def test_train_on_my_own_pictures(tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "run"  # a link, because the notebook writes beside the root
    root.symlink_to(tiny_demo.root)
    recipe = tmp_path / "recipe.toml"
    text = tiny_recipe().replace("runs/demo", str(root)).replace("validation_images = 4", "validation_images = 2")
    recipe.write_text(text.replace("_batch = 8", "_batch = 4"))  # for a folder of eight pictures
    monkeypatch.setenv("LAION_RDM_RECIPE", str(recipe))
    monkeypatch.chdir(tmp_path)  # the notebook changes the folder
    with in_process(monkeypatch):
        values = run_cells("train.ipynb", '"train.steps": 1_000', '"train.steps": 2')
    assert number_of(Image.Image, values) == 2
    trained = read_manifest(Root(tmp_path / "run-finetuned"), "runs/mine/train")
    assert trained.values["loss"] in values
