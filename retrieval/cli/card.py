"""A database's card: what it holds, from whom, under which licenses, by which encoder, and what was removed.

Reads an opened database, its metadata partition after partition; gives Markdown as model hubs show it. It is
true of the moment it is made: make it again after rows are blocked.
"""

from collections import Counter
from datetime import date
from urllib.parse import urlsplit

import pyarrow.compute as pc

from retrieval.cli.contact_sheet import plain
from retrieval.database.database import Database
from retrieval.index.effort import measured

MOST = 20
"""Sources and licenses named one by one; the rest is one line."""
LOCAL = "files of a folder"
UNKNOWN = "not stated"

CARD = """---
tags: [image-retrieval, clip-embeddings]
---
# {name}

A database of {shown:,} images by their CLIP vectors, as retrieval-augmented diffusion looks them up. It
holds vectors, addresses and captions, {pictures}.

| | |
| --- | --- |
| written | {day} |
| rows shown; blocked since it was built | {shown:,}; {blocked:,} |
| left out when it was built | {left_out} |
| encoder | {encoder} ({dim} numbers a row, float16); weights {weights} |
| made from | {made_from} |
| recall | {recall} |

## Licenses

{licenses}

## Sources

{sources}

Captions and addresses are other people's and unchecked. Who finds a picture of theirs here can have it
hidden at once: `python -m retrieval block DB ids.txt`.

```python
from retrieval import Database

database = Database.open("{name}")
found = database.search(vectors, k=19)  # (n, {dim}) of the encoder above
```
"""


def card(database: Database, day: date) -> str:
    """The card as Markdown, of this day. Reads all metadata once."""
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
        blocked=len(database) - shown,
        left_out=", ".join(f"{count:,} {word}" for word, count in manifest.reasons.items()) or "none",
        encoder=_cell(database.encoder.model),
        weights=_cell(database.encoder.weights) or "unknown",
        dim=database.dim,
        made_from=", ".join(f"{key} {value}" for key, value in sorted(manifest.upstream.items())) or UNKNOWN,
        recall=_recall(database),
        licenses=_counted("license", licenses),
        sources=_counted("source", sources),
    )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or LOCAL
    except ValueError:
        return UNKNOWN


def _recall(database: Database) -> str:
    lines = [measured(line) for line in database.manifest.values["calibration"].get("images", [])]
    said = [f"{line.recall:.3f} (of {line.k}, {line.queries} queries)" for line in lines]
    return ", ".join(said) or "not measured"


def _counted(word: str, counts: Counter[str]) -> str:
    """A table of the most frequent values, equal counts by name."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [f"| {_cell(value)} | {count:,} |" for value, count in ranked[:MOST]]
    if rest := ranked[MOST:]:
        rows.append(f"| {len(rest):,} others | {sum(count for _, count in rest):,} |")
    return "\n".join([f"| {word} | rows |", "| --- | ---: |", *rows])


def _cell(text: str) -> str:
    """Text as it stands in a table: on one line, none of it markup."""
    return plain(text)[:200].translate({ord(mark): f"\\{mark}" for mark in r"\`*_[]<>|#"})
