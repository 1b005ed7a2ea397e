"""Draws the rooms of each package and the imports between them, for CONTRIBUTING.md and for the tests.

Reads the import statements of every module. A room is a folder; a module that stands directly in a folder of
`GROUND` counts as a room. `make docs` writes the drawings; `tests/test_architecture.py` compares them.
"""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("retrieval", "pipeline", "trainer", "jobs")
FIRST_PARTY = (*PACKAGES, "benchmarks")
GROUND = ("retrieval", "pipeline", "trainer")
"""Folders with modules that count as rooms, such as `trainer/recipe.py`."""
Arrows = dict[str, set[str]]


def modules(package: str) -> list[Path]:
    """The modules of a package below the repository, sorted. Empty `__init__.py` files are left out."""
    files = sorted((REPOSITORY / package).rglob("*.py"))
    return [path.relative_to(REPOSITORY) for path in files if path.name != "__init__.py"]


def room_of(path: Path) -> str:
    """The room of a module.

    >>> room_of(Path("trainer/sampling/sampler.py")), room_of(Path("trainer/recipe.py"))
    ('trainer/sampling', 'trainer/recipe')
    """
    folder = path.parent.as_posix()
    return path.with_suffix("").as_posix() if folder in GROUND else folder


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text())


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Dotted names of everything that a module imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def module_of(name: str) -> Path | None:
    """The first-party module of a dotted name, which may end with a name inside the module; None for others.

    A public name of a package (`from retrieval import Database`) belongs to the package's `__init__.py`.
    """
    words = name.split(".")
    if words[0] not in FIRST_PARTY:
        return None
    for length in range(len(words), 0, -1):
        base = Path(*words[:length])
        if (REPOSITORY / base).with_suffix(".py").is_file():
            return base.with_suffix(".py")
        if (REPOSITORY / base / "__init__.py").is_file():
            return base / "__init__.py"
    return None


def module_arrows(package: str) -> Arrows:
    """For each module of a package the first-party modules that it imports, as paths."""
    return {
        path.as_posix(): {
            target.as_posix() for name in imported_names(path) if (target := module_of(name)) and target != path
        }
        for path in modules(package)
    }


def room_arrows(package: str) -> Arrows:
    """For each room of a package the other rooms of the same package that it imports.

    A room and the rooms inside it, such as `jobs/demo` and `jobs/demo/world`, have no arrows to each other.
    """
    arrows: Arrows = {room_of(path): set() for path in modules(package)}
    for source, targets in module_arrows(package).items():
        room = room_of(Path(source))
        for target in targets - {f"{package}/__init__.py"}:
            other = room_of(Path(target))
            if target.startswith(f"{package}/") and not _contains(room, other) and not _contains(other, room):
                arrows[room].add(other)
    return arrows


def _contains(room: str, other: str) -> bool:
    return room == other or ("/" in room and other.startswith(f"{room}/"))


def loop(arrows: Arrows) -> list[str]:
    """The nodes of one loop in order, or an empty list."""
    finished: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        for target in sorted(arrows.get(node, set()) - finished):
            if nodes := visit(target, (*path, node)):
                return nodes
        finished.add(node)
        return []

    return next((nodes for node in sorted(arrows) if (nodes := visit(node, ()))), [])


def reachable(arrows: Arrows, nodes: Iterable[str]) -> set[str]:
    """Every node that some nodes lead to, these nodes included."""
    queue, reached = list(nodes), set()
    while queue:
        if (node := queue.pop()) not in reached:
            reached.add(node)
            queue.extend(arrows.get(node, set()))
    return reached


def drawing(package: str) -> str:
    """A Mermaid chart of a package's rooms. An arrow that follows from other arrows is not drawn."""
    arrows = room_arrows(package)
    lines = ["```mermaid", "flowchart LR"]
    for room in sorted(arrows):
        implied = {end for target in arrows[room] for end in reachable(arrows, arrows.get(target, set()))}
        direct = sorted(arrows[room] - implied)
        lines += [f"    {_label(room)} --> {_label(target)}" for target in direct]
        lines += [] if direct else [f"    {_label(room)}"]
    return "\n".join([*lines, "```"])


def _label(room: str) -> str:
    return room.partition("/")[2] or "commands"


def with_drawings(text: str) -> str:
    """A Markdown text with the drawing of each package between its two marks `<!-- rooms: retrieval -->`."""
    for package in PACKAGES:
        begin, end = f"<!-- rooms: {package} -->\n", f"\n<!-- end of rooms: {package} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{drawing(package)}{end}{after}"
    return text


if __name__ == "__main__":
    page = REPOSITORY / "CONTRIBUTING.md"
    page.write_text(with_drawings(page.read_text()))
