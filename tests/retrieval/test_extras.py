"""A missing optional library is reported with the extra that installs it."""

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from retrieval import UserError
from retrieval.extras import LIBRARIES, extras_named

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
