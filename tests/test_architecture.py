"""The rules that keep the house in order: import arrows, one word per stage, the budget of STYLE."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("retrieval", "pipeline", "trainer", "jobs")
FORBIDDEN = {
    "retrieval": {"pipeline", "trainer", "jobs", "deepspeed"},
    "pipeline": {"trainer", "jobs", "deepspeed"},
    "trainer": {"pipeline", "jobs", "ray"},
    "jobs": set(),
}
STAGES = ("filter", "download", "embed", "index", "neighbors", "latents", "train", "sample", "evaluate")
SOURCES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    assert not imported(path) & FORBIDDEN[package]


@pytest.mark.parametrize(
    ("package", "files"),
    [("pipeline", ["meters.py", "runner.py"]), ("retrieval", ["cluster.py", "connection.py", "replicas.py"])],
)
def test_ray_is_known_to_few_files_alone(package: str, files: list[str]) -> None:
    users = [path.name for path in SOURCES if path.parent.name == package and "ray" in imported(path)]
    assert users == files


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_word_everywhere(stage: str) -> None:
    modules = [
        package for package in ("pipeline", "trainer") if (REPOSITORY / package / f"{stage}.py").is_file()
    ]
    assert len(modules) == 1
    assert (REPOSITORY / "jobs" / f"{stage}.py").is_file()
    assert (REPOSITORY / "tests" / modules[0] / f"test_{stage}.py").is_file()
    [line] = [
        line for line in (REPOSITORY / "Makefile").read_text().splitlines() if line.startswith("STAGES :=")
    ]
    assert stage in line.split()
    assert f"[{stage}]" in (REPOSITORY / "jobs/configs/demo.toml").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_and_functions_stay_within_the_budget(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            longest = 120 if path.name == "loop.py" else 60  # the training loop is read top to bottom
            assert lines <= longest, f"{node.name} has {lines} lines"
            assert len([a for a in arguments if a not in ("self", "cls")]) <= 5, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_file_says_why_it_exists(path: Path) -> None:
    assert not path.read_text().strip() or ast.get_docstring(ast.parse(path.read_text()))


def test_test_folders_are_no_packages() -> None:
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
