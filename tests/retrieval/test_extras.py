"""A missing optional library is reported with the extra that installs it."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from retrieval import Database, UserError
from retrieval.extras import FAISS_WHEELS, LIBRARIES, check_faiss, extras_named

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_a_missing_library_of_an_extra_becomes_a_user_error() -> None:
    with pytest.raises(UserError, match=r"pip install 'laion-rdm\[clip\]'"), extras_named():
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    with pytest.raises(UserError, match=r"s3fs is not installed.*'laion-rdm\[s3\]'"), extras_named():
        raise ImportError("Install s3fs to access S3") from ModuleNotFoundError(name="s3fs")


def test_other_import_errors_keep_their_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"), extras_named():
        raise ModuleNotFoundError("nothing", name="retrieval.nothing")


def test_every_library_belongs_to_its_extra_in_pyproject() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    distributions = packages_distributions()
    for extra, libraries in LIBRARIES.items():
        required = " ".join(extras[extra]).lower().replace("_", "-")
        for library in libraries:
            names = {name.lower().replace("_", "-") for name in distributions.get(library, [])}
            assert any(name in required for name in names), (extra, library, names)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions before the others."""
    monkeypatch.syspath_prepend(tmp_path)
    check_faiss.cache_clear()
    yield tmp_path
    check_faiss.cache_clear()


def test_two_wheels_of_faiss_are_refused_with_the_command_that_mends_it(wheels: Path) -> None:
    check_faiss()
    check_faiss.cache_clear()
    (wheels / "faiss_gpu_cu12-1.14.0.dist-info").mkdir()
    (wheels / "faiss_gpu_cu12-1.14.0.dist-info/METADATA").write_text("Name: faiss-gpu-cu12\nVersion: 1.14.0\n")
    message = "faiss-cpu and faiss-gpu-cu12 are installed.*pip uninstall -y faiss-cpu faiss-gpu-cu12"
    with pytest.raises(UserError, match=message):
        Database.open("runs/none")
    with pytest.raises(UserError, match=message), extras_named():
        raise ImportError("undefined symbol", name="faiss._swigfaiss")


def test_the_wheel_that_the_core_requires_is_among_those_that_are_looked_for() -> None:
    required = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert FAISS_WHEELS[0] in " ".join(required)
