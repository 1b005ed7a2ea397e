"""The core, installed alone into a fresh environment, builds, opens, searches and verifies a database."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checkout import copy_checkout

HEAVY = ("torch", "ray", "open_clip", "deepspeed", "gradio", "autofaiss")
SEARCH = """
import importlib.util, sys
import numpy as np
from retrieval import Database, EncoderIdentity, build_database
assert not [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
vectors = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
build_database("database", vectors, encoder=EncoderIdentity(model="random", weights="", preprocessing="", dim=32))
neighbors = Database.open("database").search(vectors[:20], k=5, recall=0.99)
assert (neighbors.similarities[:, 0] > 0.999).all()
"""


def run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def needs_of(requirements: Sequence[str]) -> set[str]:
    """Names of the distributions that are required without extras, and of all that those require."""
    names, queue = set[str](), [*requirements]
    while queue:
        need = Requirement(queue.pop())
        name = canonicalize_name(need.name)
        if name not in names and (need.marker is None or need.marker.evaluate({"extra": ""})):
            assert not need.extras, f"what the extras of {need} require must be linked too"
            names.add(name)
            queue += distribution(name).requires or ()
    return names


def link_files(name: str, site_packages: Path) -> None:
    """Link each installed file of a distribution into another environment."""
    for file in set(distribution(name).files or ()):  # some records have a file twice
        if ".." not in file.parts:
            (site_packages / file).parent.mkdir(parents=True, exist_ok=True)
            (site_packages / file).symlink_to(distribution(name).locate_file(file))


@pytest.mark.slow
def test_the_core_alone_builds_searches_and_verifies_a_database(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path / "source")
    run([sys.executable, "-m", "venv", "--without-pip", "environment"], tmp_path)
    python = tmp_path / "environment/bin/python"
    [site_packages] = (tmp_path / "environment").glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-compile", "--no-deps", source], tmp_path)
    [core] = distributions(path=[str(site_packages)])
    for name in needs_of(core.requires or ()):
        link_files(name, site_packages)
    run([sys.executable, "-m", "pip", "--python", python, "check"], tmp_path)
    run([python, "-c", SEARCH, *HEAVY], tmp_path)
    assert "match" in run([python.with_name("laion-rdm"), "verify", "database"], tmp_path)
    text_search = [python.with_name("laion-rdm"), "search", "database", "a red heart", "--clip", "ViT-B-32"]
    refused = subprocess.run(text_search, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert refused.returncode == 2
    assert "laion-rdm[clip]" in refused.stderr
