"""Writes the numbers of README.md and of the guides from the JSON files that the demo and the benchmarks committed.

Reads `docs/*.json`; writes the blocks `<!-- numbers: NAME -->` of the pages. `make docs` runs it; a test compares.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.generate import rank_counts
from jobs.reporting.estimates import against_zero, estimate_text
from jobs.reporting.tables import markdown_table
from trainer.evaluation.styles import BASELINES, stronger_baseline

REPOSITORY = Path(__file__).resolve().parents[2]
Row = tuple[str, str, str]
MODES = {
    "retrieval": "its database",
    "suffix": "its name in the prompt",
    "suffix_retrieval": "its name in the prompt, neighbors of the training database",
}
"""How a style is requested, in words."""
CONTENTS = ("shape", "count", "color", "background", "layout")
MODELS_LINK = "`make demo`, [models](jobs/demo/trained_models/README.md)"


def load(name: str) -> Any:
    """The committed numbers of one page."""
    return json.loads((REPOSITORY / "docs" / f"{name}.json").read_text())


def style_row() -> Row:
    demo = load("demo")
    accuracies = {mode: _estimate(demo, f"style_accuracy_{mode}") for mode in MODES}
    effects = {mode: _values(demo, f"style_gain_over_{mode}") for mode in BASELINES}
    against = "; ".join(
        f"{accuracies[mode]} with {words}: less by {estimate_text(effects[mode])}, {against_zero(effects[mode])}"
        for mode, words in BASELINES.items()
    )
    return (
        "style accuracy with neighbors from a style database, against two baselines",
        f"{accuracies['retrieval']}; {against}",
        MODELS_LINK,
    )


def content_row() -> Row:
    return (
        "share of 200 samples for held-out prompts that have what the prompt names, by a judge that knows the labels",
        _contents(load("demo")),
        MODELS_LINK,
    )


def trained_row() -> Row:
    """The run of `demo_train.toml` that trained all models."""
    demo = load("demo_train")
    minutes = sum(demo["seconds"].values()) / 60
    style = _estimate(demo, "style_accuracy_retrieval")
    gains = ", ".join(estimate_text(_values(demo, f"style_gain_over_{mode}")) for mode in BASELINES)
    return (
        f"the same with models that one command trained from nothing in {minutes:.0f} minutes",
        f"{_contents(demo)}; style accuracy {style}, above the baselines by {gains}",
        "`make demo ARGS=--train`",
    )


def _contents(demo: Any) -> str:
    return ", ".join(f"{name} {_estimate(demo, f'content_{name}')}" for name in CONTENTS)


def _values(numbers: Any, name: str) -> list[float]:
    """A number of the demo's report with the ends of its interval."""
    return [numbers[name], numbers[f"{name}_low"], numbers[f"{name}_high"]]


def _estimate(numbers: Any, name: str) -> str:
    return estimate_text(_values(numbers, name))


def styles() -> str:
    """Whether retrieval beats both baselines on the demo, and so for styles that no caption names."""
    demo, paper = load("demo"), load("paper")
    of_judge = {"effect": "style_gain", "effect_pixels": "style_gain_pixels"}
    effects = {
        key: {mode: _values(demo, f"{name}_over_{mode}") for mode in BASELINES} for key, name in of_judge.items()
    }
    lines = [
        "In bold: the difference to the baseline that is the stronger one by this judge. The styles of the demo, which",
        "captions of the training set name:",
        "",
        _comparison(effects),
    ]
    if "unknown_styles" in paper:
        lines += ["", *_unknown_styles(paper["unknown_styles"])]
    return "\n".join(lines)


def _comparison(tables: Any) -> str:
    """The differences of retrieval to both baselines, by each judge; in bold, to the stronger one by this judge."""
    judged = {"CLIP features": tables["effect"], "pixels": tables.get("effect_pixels")}
    judged = {judge: effects for judge, effects in judged.items() if effects}
    rows = [[words, *(_difference(effects, mode) for effects in judged.values())] for mode, words in BASELINES.items()]
    return markdown_table(["style accuracy with the style's database, minus that with", *judged], rows)


def _difference(effects: Any, mode: str) -> str:
    text = f"{estimate_text(effects[mode])}, {against_zero(effects[mode])}"
    # With equal accuracies both are the stronger one.
    is_stronger = effects[mode][0] == effects[stronger_baseline(effects)][0]
    return f"**{text}**" if is_stronger else text


def _unknown_styles(tables: Any) -> list[str]:
    """Style accuracies for styles that only a style database has."""
    styles = ", ".join(row["style"].replace("_", " ") for row in tables["styles"])
    lines = [
        f"No caption names these styles, and no training picture of any model has them: {styles}.",
        "Only a style database has them. Style accuracy by the judge on CLIP features, by that on pixels, and by the",
        "nearest real picture, which a style descriptor finds that was not trained on these styles:",
        "",
    ]
    names = ("accuracy", "accuracy_pixels", "accuracy_nearest")
    rows = [[words, *(estimate_text(tables["modes"][mode][name]) for name in names)] for mode, words in MODES.items()]
    table = markdown_table(["the style is requested by", "CLIP features", "pixels", "nearest picture"], rows)
    return [*lines, table, "", _comparison(tables)]


def search_row() -> Row:
    cells = [
        f"{point['ms']:.3f} ms {label}, {point['ratio']:.2f} x ScaNN"
        for mode, label in (("batch", "in batches, two threads"), ("single", "alone, one thread"))
        for point in load("performance")["search"]["chosen"]
        if (point["method"], point["stream"], point["k"]) == ("database", "images", 20)
        if (point["mode"], point["target"]) == (mode, 0.95)
    ]
    label = "one query on a million vectors of 768 dimensions, at equal recall@20 of 0.95"
    return (label, "; ".join(cells), "[retrieval](docs/performance.md)")


def download_row() -> Row:
    cases = load("download")["cases"]
    ratios = [case["ratio"] for case in cases]
    ours, theirs = (max(case[side]["peak_mb"] for case in cases) for side in ("ours", "theirs"))
    return (
        "images per second of download, against img2dataset",
        f"{min(ratios):.2f} to {max(ratios):.2f} x, with {ours:.0f} MB of memory instead of {theirs:.0f}",
        "[download](docs/download.md)",
    )


def crash_row() -> Row:
    struck = [outcome for outcome in load("crashes")["outcomes"] if outcome["struck"]]
    return (
        "kills, full disks and store failures that stages survived to the same bytes",
        f"{sum(not outcome['wrong'] for outcome in struck)} of {len(struck)}",
        "[crashes](docs/crashes.md)",
    )


def step_row() -> Row:
    one_rank, zero = load("step")["runs"]
    ranks = "one rank" if zero["ranks"] == 1 else f"{zero['ranks']} ranks, over torch's DDP"
    return (
        "CPU time that the training loop adds to a bare loop",
        f"{one_rank['overhead']:.1%} on one rank, {zero['overhead']:.1%} with ZeRO 1 on {ranks}",
        "[step](docs/step.md)",
    )


def filter_row() -> Row:
    sizes = load("pipeline")["filter"]["sizes"]
    first, last = sizes[0], sizes[-1]
    return (
        f"CPU time per row of filter, {last['rows']:,} generated rows with the columns of laion2B-en-joined",
        f"{last['cpu_us']:.2f} us ({first['cpu_us']:.2f} us with {first['rows']:,} rows)",
        "[pipeline](docs/pipeline.md)",
    )


def near_copies_row() -> Row:
    return (
        "other pictures that are removed as near copies by mistake, by hash or embedding",
        "; ".join(
            f"{case['false']['either']:.1%} of {case['others']} {case['name'].lower()}"
            for case in load("near_copies")["data_sets"]
        ),
        "[near copies](docs/near_copies.md)",
    )


def load_row() -> Row:
    page = load("load")
    return (
        f"searches per second on the page, {page['visitors']} visitors, {page['databases']} databases with "
        f"{page['rows']:,} rows in all",
        f"{page['per_s']:.0f}; median {page['p50_ms']:,.0f} ms, 99th percentile {page['p99_ms']:,.0f} ms, "
        f"of `/health` {page['health_p99_ms']:.0f} ms",
        "[load](docs/load.md)",
    )


def headline() -> str:
    """The table of README.md."""
    table = (
        style_row,
        content_row,
        trained_row,
        search_row,
        filter_row,
        download_row,
        near_copies_row,
        crash_row,
        step_row,
        load_row,
    )
    return markdown_table(["measured on two CPU cores", "", "page"], [row() for row in table])


def near_copies() -> str:
    """What the removal of near copies misses and removes by mistake."""
    rows = []
    for case in load("near_copies")["data_sets"]:
        cropped, mistakes = case["recall"]["cropped by 10 %"]["either"], case["false"]["either"]
        rows.append(
            [case["name"].lower(), f"{cropped:.1%} of {case['originals']}", f"{mistakes:.1%} of {case['others']}"]
        )
    return markdown_table(["", "cropped by 10 %, removed", "other pictures, removed by mistake"], rows)


def sampling() -> str:
    """The sampling methods on the demo."""
    rows = [
        [
            row["name"],
            estimate_text((row["style_accuracy"], *row["interval"])),
            f"{row['distance']:.4f}",
            f"{row['times_as_fast']:.2f} x",
        ]
        for row in load("sampling")["methods"]
    ]
    return markdown_table(["method", "style accuracy", "CLIP distance to the first", "speed"], rows)


def models() -> str:
    """The recipes of the paper's two models."""
    rows = [
        [f"`{row['recipe']}.toml`", *(f"{row[name]:,}" for name in ("parameters", "size", "batch", "steps"))]
        for row in load("training")["recipes"]
    ]
    return markdown_table(["recipe", "parameters", "resolution", "images per step", "steps"], rows)


def finetuning() -> str:
    """Memory of fine-tuning on one GPU."""
    rows = [
        [row["case"], f"{row['trained']:,}", f"{row['peak']:.1f}", f"{row['state']:.1f}"]
        for row in load("finetuning")["rows"]
    ]
    return markdown_table(["", "trained parameters", "GB at the peak", "GB held all the time"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "finetuning": finetuning,
    "headline": headline,
    "models": models,
    "near_copies": near_copies,
    "ranks": rank_counts.table,
    "sampling": sampling,
    "styles": styles,
}
"""The text of each block: `<!-- numbers: NAME -->` to `<!-- end of numbers: NAME -->`."""
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end of numbers: \2 -->)", re.DOTALL)
PAGES = (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/guides/*.md")))


def with_numbers(text: str) -> str:
    """A page with the text of its blocks."""
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_numbers(page.read_text()))
