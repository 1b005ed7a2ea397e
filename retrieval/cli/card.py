"""A database's card in Markdown: contents, sources, licenses, encoder, recall and hidden rows.

The card describes the database at the time of writing: write it again after rows were hidden.
"""

from collections import Counter
from datetime import date
from urllib.parse import urlsplit

import pyarrow.compute as pc

from retrieval.cli.contact_sheet import printable
from retrieval.database.database import Database

MAX_VALUES = 20
"""Most frequent sources and licenses that are listed; one line sums up the others."""
LOCAL = "files of a folder"
UNKNOWN = "not stated"

CARD = """---
tags: [image-retrieval, clip-embeddings]
---
# {name}

{shown:,} images, indexed by their CLIP vectors for retrieval-augmented diffusion. The database contains
vectors, URLs and captions, {pictures}.

| | |
| --- | --- |
| written | {day} |
| rows shown; hidden since the build | {shown:,}; {hidden:,} |
| left out by the build | {left_out} |
| encoder | {encoder} ({dim} numbers a row, float16); weights {weights} |
| built from | {built_from} |
| recall | {recall} |

## Licenses

{licenses}

## Sources

{sources}

Captions and URLs come from third parties and are unchecked. To hide images from all searches at once, list
their ids or URLs in a file: `python -m retrieval hide DB ids.txt`.

```python
from retrieval import Database

database = Database.open("{name}")
neighbors = database.search(vectors, k=19)  # vectors: (n, {dim}) of the encoder above; like="texts" for texts
```
"""


def card(database: Database, day: date) -> str:
    """The card as Markdown. day: the date on the card. Reads all metadata once."""
    licenses: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for partition in database.partitions:
        table = partition.metadata
        if len(database.hidden):
            table = table.filter(pc.invert(pc.is_in(table["image_id"], pc.cast(database.hidden, "int64"))))
        for value in pc.value_counts(table["license"]).to_pylist():
            licenses[value["values"] or UNKNOWN] += value["counts"]
        sources.update(_host(url) for url in table["url"].to_pylist())
    shown = licenses.total()
    manifest = database.manifest
    return CARD.format(
        name=_cell(database.name),
        pictures="and small pictures to show" if database.root.list("pictures") else "no pictures",
        day=day.isoformat(),
        shown=shown,
        hidden=len(database) - shown,
        left_out=", ".join(f"{count:,} {word}" for word, count in manifest.reasons.items()) or "none",
        encoder=_cell(database.encoder.model),
        weights=_cell(database.encoder.weights) or "unknown",
        dim=database.dim,
        built_from=", ".join(f"{key} {value}" for key, value in sorted(manifest.upstream.items())) or UNKNOWN,
        recall=_recall(database),
        licenses=_count_table("license", licenses),
        sources=_count_table("source", sources),
    )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or LOCAL
    except ValueError:
        return UNKNOWN


def _recall(database: Database) -> str:
    """For each kind of queries and each k, the measured recalls."""
    lines = []
    for kind, entries in database.calibration.items():
        for k in sorted({entry.k for entry in entries}):
            measured = [entry for entry in entries if entry.k == k]
            recalls = ", ".join("1 (all rows)" if entry.is_exact else f"{entry.recall:.3f}" for entry in measured)
            lines.append(f"{kind}, {k} neighbors ({measured[0].queries} queries): {recalls}")
    return "; ".join(lines) or "not measured"


def _count_table(title: str, counts: Counter[str]) -> str:
    """A table of the most frequent values. Values with equal counts are in alphabetical order."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [f"| {_cell(value)} | {count:,} |" for value, count in ranked[:MAX_VALUES]]
    if rest := ranked[MAX_VALUES:]:
        rows.append(f"| {len(rest):,} others | {sum(count for _, count in rest):,} |")
    return "\n".join([f"| {title} | rows |", "| --- | ---: |", *rows])


def _cell(text: str) -> str:
    """Text for a table cell: on one line, with Markdown characters escaped."""
    return printable(text)[:200].translate({ord(mark): f"\\{mark}" for mark in r"\`*_[]<>|#"})
