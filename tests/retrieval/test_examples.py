"""The example notebook runs completely on a root with the folders of the demo."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
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


def test_the_notebook_runs_without_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAION_RDM_ROOT", str(root))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # an assertion or any other exception in a cell raises here
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    sheets = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(sheets) == 3
    [drawn] = [cell.outputs[0].text for cell in notebook.cells if "pictures drawn" in cell.source]
    assert drawn.startswith("16 ")
