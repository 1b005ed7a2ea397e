"""The example notebook runs completely on a root with the folders of the demo."""

import ast
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from retrieval import Root
from retrieval.clip.encoder import Encoder
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from tests.retrieval.conftest import table_of
from tests.retrieval.tiny_clip import write_clip

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "search.ipynb"
ROWS = 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two databases of random pictures, and their encoder."""
    encoder = Encoder(write_clip(tmp_path / "clip", seed=0))
    for seed, style in enumerate(("neon", "woodcut")):
        folder = tmp_path / "world" / "styles" / style
        folder.mkdir(parents=True)
        noise = np.random.default_rng(seed).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
        pictures = [Image.fromarray(values) for values in noise]
        names = [f"{style}/{number:02d}.png" for number in range(ROWS)]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder.parent / name)
        table = table_of(encoder.encode_images(pictures))
        url = table.schema.get_field_index("url")
        table = table.set_column(url, schema.METADATA.field("url"), [names])
        identity = DatabaseIdentity(f"databases/{style}", {"source": style})
        write_database(Root(tmp_path), table, encoder.identity, IndexConfig(num_queries=10), identity)
    return tmp_path


def run_cells(notebook: Path) -> list[object]:
    """Check the format and run the code cells in order, as Jupyter does, in this process.

    Returns the values of their expressions.
    """
    document = nbformat.read(notebook, as_version=4)
    nbformat.validate(document)
    values: list[object] = []
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "displayhook", values.append)
        for number, cell in enumerate(document.cells):
            if cell.cell_type == "code":
                statements = ast.Interactive(ast.parse(cell.source).body)
                exec(compile(statements, f"{notebook.name}, cell {number}", "single"), names)
    return values


@pytest.mark.usefixtures("ray_cluster")
def test_the_notebook_runs_without_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAION_RDM_ROOT", str(root))
    monkeypatch.setattr(plt, "show", lambda: None)
    values = run_cells(NOTEBOOK)
    [figure] = plt.get_fignums()
    plt.close(figure)
    assert sum(isinstance(value, Image.Image) for value in values) == 2
    assert sum(isinstance(value, pd.DataFrame) for value in values) == 3
    assert "\n16 pictures drawn" in capsys.readouterr().out
