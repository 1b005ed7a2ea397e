"""README and guides: links and commands exist, and every block that a small machine can run is run.

A block that cannot run here says why after its language, as in "shell (gpu)".
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from docs.generate import numbers
from tests.checkout import copy_checkout
from tests.jobs.demo.tiny_demo import TinyDemo, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("docs/guides/*.md"))]
WITHOUT_RAY = REPOSITORY / "tests/pipeline/without_ray.py"
REASONS = {
    "cluster": "needs a Ray cluster elsewhere",
    "data": "needs data that the reader has",
    "gpu": "needs GPUs",
    "install": "installs packages",
    "long": "runs for many minutes; the other tests and CI run it",
    "serves": "does not end by itself; the page has its own tests",
    "weights": "needs weights that the reader downloads",
}
FENCE = re.compile(r"^```(\w+)(?: \((\w+)\))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    reason: str
    """Why it is not run, or empty."""
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*groups) for groups in FENCE.findall(page.read_text())]


def pages_that_run() -> list[Path]:
    return [page for page in PAGES if any(is_run(block) for block in blocks(page))]


def is_run(block: Block) -> bool:
    return block.language in ("python", "shell") and not block.reason


@pytest.fixture(scope="module")
def checkout(tiny_demo: TinyDemo, forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository in which `make demo` has finished a tiny demo. Commands run in forks, without Ray."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout"))
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("lib", "bin/tensorboard"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix, name))
    for name, words in (("python", f'"{WITHOUT_RAY}"'), ("laion-rdm", "-m jobs.cli.laion_rdm")):
        command = folder / ".venv/bin" / name
        command.write_text(f'#!/bin/sh\nexec "{forked_python}" {words} "$@"\n')
        command.chmod(0o755)
    (folder / ".venv/installed").touch()  # newer than the copied files: make installs nothing
    (folder / "jobs/configs/demo.toml").write_text(tiny_recipe())
    shutil.copytree(tiny_demo.root, folder / "runs/demo")
    (folder / "runs/docs").mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished() -> set[str]:
    """Shell lines that ran for an earlier page; they need not run again for the next."""
    return set()


@pytest.mark.parametrize("page", pages_that_run(), ids=lambda page: page.stem)
@pytest.mark.usefixtures("ray_cluster")
def test_the_blocks_of_a_page_run_in_order(
    page: Path, checkout: Path, forked_python: Path, finished: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PYTHON_EXEC", str(forked_python))  # for the ranks of torchrun
    for variable in ("MAKEFLAGS", "MFLAGS", "ARGS"):  # of the make that runs these tests
        monkeypatch.delenv(variable, raising=False)
    names: dict[str, object] = {}
    for block in filter(is_run, blocks(page)):
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
            continue
        command = "\n".join(line for line in block.text.splitlines() if line.split(" #")[0].strip() not in finished)
        done = subprocess.run(["bash", "-eu", "-c", command], capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        finished.update(line.split(" #")[0].strip() for line in block.text.splitlines())


def test_a_block_that_is_not_run_has_a_known_reason() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert not block.reason or block.reason in REASONS, f"{page.name}: {block.reason}"


def test_every_make_command_of_the_pages_names_a_target_of_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    stages = re.search(r"^STAGES := (.*)$", makefile, re.MULTILINE)
    assert stages
    targets = {*stages[1].split(), *re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)}
    for page in [*PAGES, *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("jobs/configs/*.toml")]:
        for target in re.findall(
            r"(?:^|`|# command +|    )make ([a-z][a-z-]*)\b(?!\.)", page.read_text(), re.MULTILINE
        ):
            assert target in targets, f"{page.name}: make {target}"


def test_links_of_the_pages_lead_to_files() -> None:
    for page in [*PAGES, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for target, _ in LINK.findall(page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(REPOSITORY)}: {target}"


def test_the_pages_show_the_committed_numbers() -> None:
    for page in PAGES:
        text = page.read_text()
        assert numbers.with_numbers(text) == text, f"{page.name}: run 'make docs'"
        assert text.count("<!-- numbers: ") == len(numbers.BLOCK.findall(text)), page.name


def test_a_changed_number_changes_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {name: numbers.load(name) for name in ("demo", "paper")}
    monkeypatch.setattr(numbers, "load", pages.__getitem__)
    gain = "style_gain_over_suffix_retrieval"
    for value, low, high, words in ((0.2, 0.1, 0.3, "above 0"), (0.0, -0.1, 0.1, "not distinguishable from 0")):
        pages["demo"] |= {gain: value, f"{gain}_low": low, f"{gain}_high": high}
        for text in (numbers.styles(), numbers.style_row()[1]):
            assert f"{value:.3f} ({low:.3f} to {high:.3f}), {words}" in text


def test_the_difference_to_the_stronger_baseline_by_each_judge_is_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {name: numbers.load(name) for name in ("demo", "paper")}
    monkeypatch.setattr(numbers, "load", pages.__getitem__)
    gains = (
        ("", "suffix", 0.1),
        ("", "suffix_retrieval", 0.2),
        ("_pixels", "suffix", 0.4),
        ("_pixels", "suffix_retrieval", 0.3),
    )
    for judge, mode, value in gains:
        name = f"style_gain{judge}_over_{mode}"
        pages["demo"] |= {name: value, f"{name}_low": 0.05, f"{name}_high": 0.5}
    table = numbers.styles()
    for value, is_stronger in ((0.1, True), (0.2, False), (0.4, False), (0.3, True)):
        assert (f"| **{value:.3f} (0.050 to 0.500), above 0** |" in table) == is_stronger


def test_readme_shows_the_search_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = numbers.load("performance")
    monkeypatch.setattr(numbers, "load", lambda name: page)
    [ours] = [
        row
        for row in page["search"]["chosen"]
        if (row["method"], row["stream"], row["k"], row["mode"], row["target"])
        == ("database", "images", 20, "single", 0.95)
    ]
    ours["ms"] = 0.4567
    assert "0.457 ms alone" in numbers.search_row()[1]


def test_a_style_that_no_caption_names_is_on_the_page_once_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {name: numbers.load(name) for name in ("demo", "paper")}
    paper = pages["paper"]
    paper["tables"]["effect_pixels"]["suffix_retrieval"] = [0.7, 0.6, 0.8]
    paper["unknown_styles"] = paper["tables"] | {"styles": [{"style": name} for name in ("blueprint", "my_own")]}
    monkeypatch.setattr(numbers, "load", pages.__getitem__)
    text = numbers.styles()
    assert "no training picture of any model has them: blueprint, my own." in text
    assert text.count("0.700 (0.600 to 0.800), above 0") == 1
    suffix = paper["tables"]["modes"]["suffix"]
    accuracies = [numbers.estimate_text(suffix[name]) for name in ("accuracy", "accuracy_pixels", "accuracy_nearest")]
    assert f"| its name in the prompt | {' | '.join(accuracies)} |" in text
