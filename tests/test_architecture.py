"""Rules of the layout: arrows between packages and rooms, one word per stage, sizes, docstrings."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from docs.generate.rooms import (
    FIRST_PARTY,
    PACKAGES,
    REPOSITORY,
    imported_names,
    loop,
    module_arrows,
    modules,
    room_arrows,
    tree_of,
    with_drawings,
)

FORBIDDEN = {
    "retrieval": {"pipeline", "trainer", "jobs", "deepspeed"},
    "pipeline": {"trainer", "jobs", "deepspeed"},
    "trainer": {"pipeline", "jobs", "ray"},
    "jobs": set(),
}
RAY_USERS = {"retrieval/cluster", "pipeline/runtime", "jobs/cluster"}
ARROWS = """
retrieval/__main__: cli
retrieval/cli: clip database errors extras imports index pictures provenance recipe storage updates
retrieval/arrow_files: storage
retrieval/clip: config errors recipe storage
retrieval/cluster: config database errors index storage
retrieval/config:
retrieval/database: clip errors extras file_cache index kernel recipe storage
retrieval/errors:
retrieval/extras: errors
retrieval/imports: arrow_files clip config database errors index recipe storage
retrieval/file_cache: errors storage
retrieval/index: errors file_cache kernel storage
retrieval/join: database index kernel recipe
retrieval/kernel:
retrieval/lazy: extras
retrieval/perceptual_hash:
retrieval/pictures: errors storage
retrieval/provenance: errors extras pictures
retrieval/recipe: config
retrieval/storage: config errors extras
retrieval/updates: database errors imports index recipe storage
pipeline/capacity: pictures recipe
pipeline/databases: embed pictures recipe runtime
pipeline/download: filter pictures recipe runtime web
pipeline/embed: pictures recipe runtime
pipeline/filter: recipe runtime web
pipeline/import_pictures: databases download recipe runtime web
pipeline/index: runtime web
pipeline/neighbors: recipe runtime
pipeline/optout: download neighbors pictures recipe runtime web
pipeline/pictures: recipe runtime
pipeline/recipe:
pipeline/runtime:
pipeline/web:
trainer/attribution: sampling
trainer/checkpoint: data engine model recipe
trainer/data: model recipe
trainer/engine: recipe
trainer/evaluation: model sampling
trainer/evaluation/paper: data model recipe sampling training
trainer/model:
trainer/recipe: model
trainer/released: checkpoint data model recipe
trainer/sampling: model
trainer/tracking: data engine model recipe
trainer/training: checkpoint data engine evaluation model recipe sampling tracking
jobs: cli cluster
jobs/capacity: cli reporting
jobs/cli:
jobs/cluster: cli
jobs/demo: jobs cli finetune
jobs/demo/judge: cli demo/models demo/world
jobs/demo/models: demo/world
jobs/demo/report: cli demo/judge reporting
jobs/demo/server:
jobs/demo/world:
jobs/explore: jobs cli
jobs/explore/tabs:
jobs/finetune: jobs cli imports
jobs/imports: cli
jobs/paper: jobs cli reporting
jobs/reporting:
jobs/status: cli
jobs/view: cli reporting
"""
"""Each room and the rooms of the same package that it imports, without the package's name."""
MAX_MODULES = 12
STAGES = ("filter", "download", "embed", "index", "neighbors", "latents", "train", "sample", "evaluate")
SOURCES = [path for package in PACKAGES for path in modules(package)]
NATIVE = [path for package in PACKAGES for end in ("cpp", "h") for path in (REPOSITORY / package).rglob(f"*.{end}")]


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def test_imports_follow_the_arrows_between_packages() -> None:
    for path in SOURCES:
        assert not top_level(path) & FORBIDDEN[path.parts[0]], path


@pytest.mark.parametrize("package", FIRST_PARTY)
def test_rooms_and_modules_import_each_other_without_loops(package: str) -> None:
    assert loop(room_arrows(package)) == []
    without_faces = {
        source: {target for target in targets if not target.endswith("__init__.py")}
        for source, targets in module_arrows(package).items()
    }
    assert loop(without_faces) == []


def test_rooms_import_the_rooms_in_their_list_and_no_others() -> None:
    listed = dict(line.split(":") for line in ARROWS.strip().splitlines())
    arrows = {room: targets for package in PACKAGES for room, targets in room_arrows(package).items()}
    assert {room: {target.partition("/")[2] or target for target in targets} for room, targets in arrows.items()} == {
        room: set(targets.split()) for room, targets in listed.items()
    }


def test_the_drawings_of_rooms_are_those_of_the_imports() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert with_drawings(text) == text, "run 'make docs'"


def test_no_folder_has_more_than_twelve_modules() -> None:
    folders = Counter(path.parent for package in FIRST_PARTY for path in modules(package))
    assert {folder: count for folder, count in folders.items() if count > MAX_MODULES} == {}


def test_every_room_says_what_it_is_for() -> None:
    for package in FIRST_PARTY:
        for folder in {path.parent for path in modules(package)}:
            assert ast.get_docstring(tree_of(folder / "__init__.py")), folder


def test_nothing_outside_the_demo_imports_the_demo() -> None:
    for path in SOURCES:
        if path.parts[:2] != ("jobs", "demo"):
            assert not [name for name in imported_names(path) if name.startswith("jobs.demo")], path


def test_only_the_rooms_that_run_on_ray_import_it() -> None:
    assert {path.parent.as_posix() for path in SOURCES if "ray" in top_level(path)} == RAY_USERS


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_word_everywhere(stage: str) -> None:
    [path] = [path for path in SOURCES if path.stem == stage and path.parts[0] in ("pipeline", "trainer")]
    assert (REPOSITORY / "jobs" / f"{stage}.py").is_file()
    assert (REPOSITORY / "tests" / path.parent / f"test_{stage}.py").is_file()
    targets = re.search(r"^STAGES := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert stage in targets[1].split()
    assert f"[{stage}]" in (REPOSITORY / "jobs/configs/demo.toml").read_text()


def test_files_and_functions_stay_within_their_limits() -> None:
    assert NATIVE
    for path in [*SOURCES, *NATIVE]:
        assert (REPOSITORY / path).read_text().count("\n") <= 350, path
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert lines <= 40, f"{path}: {node.name} has {lines} lines"
                assert len([a for a in arguments if a not in ("self", "cls")]) <= 5, f"{path}: {node.name}"


def test_every_module_says_why_it_exists() -> None:
    for path in SOURCES:
        assert ast.get_docstring(tree_of(path)), path


def test_test_folders_are_no_packages() -> None:
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
