"""What all benchmarks share: folders, arguments, goals, and writing results to docs/."""

import argparse
import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRATCH = REPOSITORY / "runs" / "bench"
DOCS = REPOSITORY / "docs"
Page = Callable[[dict[str, Any]], str]
"""Results -> the page as Markdown."""


def benchmark_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """The argument that all benchmarks have: --docs. module: its name below `benchmarks`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results")
    return parser


def thread_count(count: int) -> str:
    """A number of threads in words."""
    return f"{count} thread{'s' if count > 1 else ''}"


def write_report(folder: Path, name: str, result: dict[str, Any], page: str) -> None:
    """Write `<name>.json` and `<name>.md` atomically, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_atomically(folder / f"{name}.md", page)
    print(page)
    print(f"written: {folder / name}.md")


def write_part(stored: Path, result: dict[str, Any], parts: Collection[str], page: Page) -> None:
    """Write the JSON file `stored` with the parts measured so far; with all of them also the page."""
    if result.keys() >= {*parts}:
        write_report(stored.parent, stored.stem, result, page(result))
        return
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(stored, json.dumps(result, indent=1) + "\n")


def machines(hardware: dict[str, str]) -> str:
    """The hardware of each part in words. The parts are named if they were measured on several machines."""
    parts: dict[str, list[str]] = {}
    for part, machine in hardware.items():
        parts.setdefault(machine, []).append(part)
    if len(parts) == 1:
        return next(iter(parts))
    return "; ".join(f"{machine} ({', '.join(names)})" for machine, names in parts.items())


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


@dataclass(frozen=True)
class Goal:
    """A goal that was set before the measurement, and the measured value."""

    name: str
    target: float
    measured: float
    is_upper_bound: bool = False
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        """True if the measured value reaches the target."""
        return self.measured <= self.target if self.is_upper_bound else self.measured >= self.target

    @property
    def cells(self) -> list[str]:
        """A row of the table of goals, with the distance in percent for a missed goal."""
        sign, unit = "<=" if self.is_upper_bound else ">=", " x" if self.unit == "x" else self.unit
        verdict = "reached" if self.is_met else f"**missed by {abs(self.measured / self.target - 1):.1%}**"
        return [self.name, f"{sign} {self.target:g}{unit}", f"{self.measured:.3g}{unit}", verdict]
