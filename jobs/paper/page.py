"""The page of the paper's experiments: one HTML file with its pictures inside, and the manual's page.

Reads `runs/<name>/paper/`; writes `report.html` there, and `paper.md`, `paper.json` and pictures in a folder
of documents. What was wanted of each experiment stands beside what was measured.
"""

import json
import os
from base64 import b64encode
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.reporting.charts import duration
from jobs.reporting.hardware import hardware
from jobs.reporting.page import render
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.paper.charts import MODE_LABELS, TITLES
from trainer.evaluation.paper.controls import RANDOM_ROWS, SHUFFLED
from trainer.evaluation.styles import RETRIEVAL, SUFFIX, style_words

ABOUT_CHANCE = 1.5
"""Accuracies up to this many times chance count as chance, as in the demo's report."""
CHARTS = ("improvement", "modes", "held_out", "distances", "times")
QUALITY, DOCS_PX = 88, 1400


@dataclass(frozen=True)
class Verdict:
    """What was wanted of an experiment, and what was found."""

    about: str
    measured: str
    wanted: str
    met: bool


@dataclass(frozen=True)
class Page:
    """What both pages show. pictures: PNG bytes by name."""

    folder: str
    found: dict[str, Any]
    verdicts: tuple[Verdict, ...]
    pictures: dict[str, bytes]
    seconds: float


def write_page(root: Root, folder: str) -> Page:
    """Write `report.html` of finished experiments. Raises UserError where they did not finish."""
    manifest = read_manifest(root, folder)
    found = root.read_json(f"{folder}/paper.json")
    pictures = {}
    for name in manifest.checksums():
        if name.endswith(".png") and name.count("/") == folder.count("/") + 1:
            with root.open(name) as file:
                pictures[Path(name).stem] = file.read()
    page = Page(folder, found, tuple(verdicts(found)), pictures, manifest.seconds)
    sources = {name: _inline(name, data) for name, data in pictures.items()}
    root.write_bytes(f"{folder}/report.html", _render("page.html.jinja", page, sources).encode())
    return page


def write_docs(root: Root, page: Page, docs: Path) -> Path:
    """Write `paper.md` with its numbers and pictures. Returns its place."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    sources = {}
    for name, data in page.pictures.items():
        file, content = _small(name, data)
        _write(docs / "images" / file, content)
        sources[name] = f"images/{file}"
    facts = {**page.found, "verdicts": [asdict(one) for one in page.verdicts], "hardware": hardware()}
    _write(docs / "paper.json", json.dumps(facts, indent=1).encode() + b"\n")
    _write(docs / "paper.md", _render("page.md.jinja", page, sources).encode())
    return docs / "paper.md"


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Whether the effect is there, and whether each control loses it."""
    tables, chance = found["tables"], found["tables"]["chance"]
    results = [
        _above_zero(
            "Samples taken for their database's style, over no neighbors", tables["effect"]["no_neighbors"]
        ),
        _above_zero("The same over naming the style", tables["effect"][SUFFIX]),
        _above_zero("The same over another style's neighbors", tables["effect"][SHUFFLED]),
    ]
    for mode in (SHUFFLED, RANDOM_ROWS):
        value, low, high = tables["modes"][mode]["accuracy"]
        about = f"Negative {MODE_LABELS[mode]}"
        wanted = f"about chance: ≤ {ABOUT_CHANCE * chance:.3g}"
        results.append(Verdict(about, _said((value, low, high)), wanted, value <= ABOUT_CHANCE * chance))
    if "added" in found["held_out"]:
        added = found["held_out"]["added"]
        results.append(_above_zero("Held-out loss added by another image's neighbors", added["shuffled"]))
        results.append(_above_zero("Held-out loss added by no neighbors", added["none"]))
    for one in found["copying"]:
        about = f"Samples nearer {TITLES[one['name']]} than 99% of real images to another"
        share = one["share_nearer"]
        results.append(Verdict(about, _said(share), "≤ 0.01", share[0] <= 0.01))
    return results


def verdict_lines(page: Page) -> str:
    """The verdicts as a table for a terminal."""
    rows = [(one.about, one.measured, one.wanted, "met" if one.met else "MISSED") for one in page.verdicts]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]) for row in rows)


def _above_zero(about: str, estimate: tuple[float, float, float]) -> Verdict:
    return Verdict(about, _said(estimate), "interval above 0", estimate[1] > 0)


def _said(estimate: tuple[float, float, float]) -> str:
    """A figure with its interval.

    >>> _said((0.5, 0.25, 0.75))
    '0.500 (0.250 to 0.750)'
    """
    value, low, high = estimate
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _render(template: str, page: Page, sources: dict[str, str]) -> str:
    content = {
        "page": page,
        "sources": sources,
        "labels": MODE_LABELS,
        "titles": TITLES,
        "retrieval": RETRIEVAL,
        "suffix": SUFFIX,
        "hardware": hardware(),
        "took": duration(page.seconds),
        **page.found,
    }
    return render(Path(__file__).with_name(template), content, {"said": _said, "words": style_words})


def _small(name: str, data: bytes) -> tuple[str, bytes]:
    """File name and content for a document: charts as they are, sheets of pictures as JPEG."""
    if name in CHARTS:
        return f"paper-{name}.png", data
    with Image.open(BytesIO(data)) as picture:
        sheet = picture.convert("RGB")
    sheet.thumbnail((DOCS_PX, DOCS_PX), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"paper-{name}.jpg", buffer.getvalue()


def _inline(name: str, data: bytes) -> str:
    file, content = _small(name, data)
    kind = "jpeg" if file.endswith("jpg") else "png"
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def _write(path: Path, content: bytes) -> None:
    pending = path.with_name(f"{path.name}.partial")
    pending.write_bytes(content)
    os.replace(pending, path)
