"""Pages of the paper's experiments, which compare measured and expected results.

Reads `runs/<name>/paper/`; writes `report.html` there, and `paper.md`, `paper.json` and pictures for the documentation.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.reporting.charts import duration
from jobs.reporting.estimates import StoredEstimate, against_zero, estimate_text, interval_text
from jobs.reporting.hardware import hardware
from jobs.reporting.judges import gallery_words
from jobs.reporting.page import render
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.evaluation.paper.charts import MODE_LABELS, TITLES
from trainer.evaluation.paper.controls import RANDOM_ROWS, SHUFFLED
from trainer.evaluation.scores import completed
from trainer.evaluation.styles import BASELINES, NO_NEIGHBORS, RETRIEVAL, stronger_baseline, style_words
from trainer.sampling.request import FULL

ABOUT_CHANCE = 1.5
"""Accuracies up to this many times chance count as chance, as in the demo's report."""
GAINS = {**BASELINES, NO_NEIGHBORS: "no neighbors", SHUFFLED: "neighbors of another style"}
CHARTS = ("improvement", "modes", "held_out", "distances", "times", "tradeoff")
QUALITY, DOCS_PX = 88, 1400


@dataclass(frozen=True)
class Verdict:
    """Expected and measured result of an experiment."""

    about: str
    measured: str
    wanted: str
    met: bool


@dataclass(frozen=True)
class Page:
    """Content of both pages. results: values of `paper.json`; pictures: PNG bytes by name."""

    folder: str
    results: dict[str, Any]
    verdicts: tuple[Verdict, ...]
    pictures: dict[str, bytes]
    seconds: float


def write_page(root: Root, folder: str) -> Page:
    """Write `report.html` of finished experiments. Raises UserError if they did not finish."""
    manifest = read_manifest(root, folder)
    results = _completed(root.read_json(f"{folder}/paper.json"))
    pictures = {}
    for name in manifest.checksums():
        if name.endswith(".png") and name.count("/") == folder.count("/") + 1:
            with root.open(name) as file:
                pictures[Path(name).stem] = file.read()
    page = Page(folder, results, tuple(verdicts(results)), pictures, manifest.seconds)
    sources = {name: _inline(name, data) for name, data in pictures.items()}
    root.write_bytes(f"{folder}/report.html", _render("page.html.jinja", page, sources).encode())
    return page


def write_docs(root: Root, page: Page, docs: Path) -> Path:
    """Write `paper.md`, `paper.json` and `images/`. Returns the path of `paper.md`."""
    folder, sources = Root(docs), {}
    for name, data in page.pictures.items():
        file, content = _small(name, data)
        sources[name] = folder.write_bytes(f"images/{file}", content).name
    values = {**page.results, "verdicts": [asdict(verdict) for verdict in page.verdicts], "hardware": hardware()}
    folder.write_bytes("paper.json", json.dumps(values, indent=1).encode() + b"\n")
    folder.write_bytes("paper.md", _render("page.md.jinja", page, sources).encode())
    return docs / "paper.md"


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Whether neighbors have the expected effect and the controls do not; the baselines come first."""
    tables = results["tables"]
    limit = ABOUT_CHANCE * tables["chance"]
    rows = _gains("Style accuracy with the database's neighbors", tables, GAINS)
    if "unknown_styles" in results:
        about = "Style accuracy with the database's neighbors, styles that no caption names"
        rows += _gains(about, results["unknown_styles"], BASELINES)
    for mode in (SHUFFLED, RANDOM_ROWS):
        rows.append(_at_most(f"Negative {MODE_LABELS[mode]}", tables["modes"][mode]["accuracy"], limit))
    if "added" in results["held_out"]:
        added = results["held_out"]["added"]
        rows.append(_above_zero("Held-out loss, increase with another image's neighbors", added["shuffled"]))
        rows.append(_above_zero("Held-out loss, increase with no neighbors", added["none"]))
    for distances in results["copying"]:
        about = f"Share of samples nearer than 99% of real images: {TITLES[distances['name']]}"
        rows.append(_at_most(about, distances["share_nearer"], 0.01))
    return rows


def verdict_lines(page: Page) -> str:
    """The verdicts as a table for a terminal."""
    rows = [
        (verdict.about, verdict.measured, verdict.wanted, "met" if verdict.met else "MISSED")
        for verdict in page.verdicts
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]) for row in rows)


def settings_text(asked: dict[str, Any]) -> str:
    """The settings of all samples in words. Earlier versions did not store those that are left out by default."""
    low, high = interval = tuple(asked.get("guidance_interval", FULL))
    weight, size = asked.get("neighbor_weight", 1.0), [asked.get(side, 0) for side in ("width", "height")]
    parts = [
        f"{asked['k']} neighbors" + (f" of weight {weight:g}" if weight != 1 else ""),
        f"guidance {asked['guidance']:g}" + (f" at noise levels {low:g} to {high:g}" if interval != FULL else ""),
        f"negative prompt “{negative}”" if (negative := asked.get("negative_prompt")) else "",
        f"{asked['steps']} steps of {asked['scheduler']}",
        " x ".join(str(side or "the training size") for side in size) + " pixels" if any(size) else "",
    ]
    return ", ".join(filter(None, parts))


def default_line(results: dict[str, Any]) -> str:
    """The setting that the curve of style against content chooses, in words; empty if it was not measured."""
    if "tradeoff" not in results:
        return ""
    row, wanted = results["tradeoff"]["default"], results["tradeoff"]["wanted"]
    low, high = row["guidance_interval"]
    setting = f"guidance = {row['guidance']:g}, k = {row['k']}, guidance_interval = [{low:g}, {high:g}]"
    setting += f", neighbor_weight = {row['neighbor_weight']:g}"
    values = f"style {estimate_text(row['style'])}, content {estimate_text(row['content'])}"
    if row["reached"]:
        return f"default by the curve: {setting}: {values}"
    goals = f"style {wanted['style']:g} and content {wanted['content']:g}"
    return f"no setting of the curve reaches {goals}; the nearest is {setting}: {values}"


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Values of `paper.json`; those of earlier versions have no style descriptor and no weight of the neighbors."""
    results = stored | {name: completed(stored[name]) for name in ("tables", "unknown_styles") if name in stored}
    if curve := stored.get("tradeoff"):
        unweighted = {"neighbor_weight": 1.0}
        settings = [unweighted | row for row in curve["settings"]]
        results["tradeoff"] = {**curve, "settings": settings, "default": unweighted | curve["default"]}
    return results


def _gains(about: str, tables: dict[str, Any], modes: Iterable[str]) -> list[Verdict]:
    """The gain of retrieval over other modes, by each judge."""
    return [
        _above_zero(f"{about}{judge}, gain over {GAINS[mode]}", tables[effect][mode])
        for mode in modes
        for effect, judge in (("effect", ""), ("effect_pixels", ", by pixels"))
        if tables[effect]
    ]


def _above_zero(about: str, estimate: StoredEstimate) -> Verdict:
    return Verdict(about, estimate_text(estimate), "interval above 0", against_zero(estimate) == "above 0")


def _at_most(about: str, estimate: tuple[float, float, float], limit: float) -> Verdict:
    return Verdict(about, estimate_text(estimate), f"interval not above {limit:.3g}", estimate[1] <= limit)


def _render(template: str, page: Page, sources: dict[str, str]) -> str:
    tables = page.results["tables"]
    content = {
        "page": page,
        "sources": sources,
        "labels": MODE_LABELS,
        "titles": TITLES,
        "retrieval": RETRIEVAL,
        "baselines": BASELINES,
        "baseline": stronger_baseline(tables["effect"]),
        "baseline_pixels": tables["effect_pixels"] and stronger_baseline(tables["effect_pixels"]),
        "hardware": hardware(),
        "took": duration(page.seconds),
        "default_line": default_line(page.results),
        "settings": settings_text(page.results["asked"]),
        **page.results,
    }
    filters: dict[str, Callable[..., str]] = {
        "estimate": estimate_text,
        "interval": interval_text,
        "against_zero": against_zero,
        "gallery": gallery_words,
        "words": style_words,
    }
    return render(Path(__file__).with_name(template), content, filters)


def _small(name: str, data: bytes) -> tuple[str, bytes]:
    """File name and content for a page: charts as PNG, contact sheets as JPEG of reduced size."""
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
