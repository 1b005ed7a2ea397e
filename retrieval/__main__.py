"""`python -m retrieval COMMAND DB`: search, inspect, verify, build and mend databases from the shell.

Ends with code 0; 1 where `verify` found damage; 2 for a mistake that can be mended, told without traceback.
What trains or encodes loads torch, so it is imported by the commands that need it.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from retrieval.cli.arguments import parser
from retrieval.cli.card import card
from retrieval.cli.contact_sheet import Answer, answers_of, credit, plain, write_sheet
from retrieval.cli.queries import Asked, encode, read_vectors
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.database import Database
from retrieval.database.verify import Sample, damaged_files, measure_recall, visible_positions
from retrieval.errors import UserError
from retrieval.imports.source import Columns, Source
from retrieval.index.effort import measured
from retrieval.index.hidden import block
from retrieval.recipe import IndexConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import image_id

DAMAGED, USER_ERROR = 1, 2
CAPTION_WIDTH = 50
"""Characters of a caption in the table that search prints."""

Arguments = argparse.Namespace


def search(arguments: Arguments) -> int:
    """Print, and draw where asked, the k nearest rows of each query."""
    database = Database.open(arguments.database)
    asked = Asked(arguments.texts, arguments.image, arguments.vector, arguments.clip, arguments.pretrained)
    names, vectors = encode(asked, database)
    found = database.search(vectors, arguments.k, recall=arguments.recall)
    answers = answers_of(names, found)
    if arguments.sheet:
        drawn = write_sheet(arguments.sheet, answers, arguments.pictures)
        print(f"{arguments.sheet}: {drawn} pictures found below {arguments.pictures}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([vars(answer) for answer in answers], indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(_table(answer) for answer in answers))
    return 0


def info(arguments: Arguments) -> int:
    """Print what a database is."""
    database = Database.open(arguments.database)
    manifest = database.manifest
    rows = database.partition_rows
    calibration = manifest.values["calibration"]
    facts = {
        "rows": len(database),
        "blocked": len(database) - len(visible_positions(database)),
        "dim": database.dim,
        "encoder": database.encoder.model,
        "weights": database.encoder.weights or "unknown",
        "partitions": len(rows),
        "rows per partition": [int(rows.min()), int(rows.max())],
        "bytes": sum(file.bytes for shard in manifest.shards for file in shard.files),
        "left out": manifest.reasons,
        "settings": manifest.config,
        "made from": manifest.upstream,
        "schema version": manifest.schema_version,
    }
    if arguments.json:
        print(json.dumps({**facts, "calibration": calibration}, indent=1))
        return 0
    for key, value in facts.items():
        print(f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}")
    for like in calibration:
        _print_calibration(database, like)
    return 0


def verify(arguments: Arguments) -> int:
    """Check every file against its checksum, then measure recall."""
    root = Root(arguments.database)
    if damaged := damaged_files(root):
        print("\n".join(f"damaged: {line}" for line in damaged))
        return DAMAGED
    files = len(read_manifest(root, "").checksums())
    print(f"{files} files as their manifest states")
    sample = Sample(arguments.queries, arguments.k, arguments.recall, arguments.seed)
    print(f"{measure_recall(Database.open(root), sample)}, where {arguments.recall} is wanted")
    return 0


def build(arguments: Arguments) -> int:
    """Build a database of vectors that another tool made."""
    from retrieval.imports.importer import build_from, dimension

    columns = dict(_named(pair) for pair in arguments.column)
    try:
        source = Source(arguments.source, arguments.metadata, Columns(**columns), arguments.part)
        config = IndexConfig.model_validate(
            {"rows_per_partition": arguments.rows_per_partition, "index_key": arguments.index_key}
        )
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"an option cannot be used: {'; '.join(problems)}") from error
    encoder = EncoderIdentity(
        model=arguments.model, weights=arguments.weights, preprocessing="", dim=dimension(source)
    )
    manifest = build_from(arguments.database, source, encoder, config)
    left_out = "".join(f", {count:,} {word}" for word, count in manifest.reasons.items())
    print(f"{arguments.database}: {manifest.rows:,} rows of dim {encoder.dim}{left_out}")
    return 0


def hide(arguments: Arguments) -> int:
    """Hide rows from every search from now on, without building again."""
    ids = [_blocked_id(line) for line in _lines(arguments.ids)]
    print(f"{block(Root(arguments.database), np.array(ids, np.int64))} rows are blocked")
    return 0


def calibrate(arguments: Arguments) -> int:
    """Measure which effort gives which recall for queries of your own kind, and keep it."""
    from retrieval.database.calibration import recalibrate

    root = Root(arguments.database)
    recalibrate(root, read_vectors(arguments.queries), arguments.like)
    _print_calibration(Database.open(root), arguments.like)
    return 0


def describe(arguments: Arguments) -> int:
    """Print a database's card, or write it beside its files as README.md."""
    text = card(Database.open(arguments.database), datetime.now(UTC).date())
    if arguments.write:
        Root(arguments.database).write_bytes("README.md", text.encode())
    else:
        print(text)
    return 0


def _print_calibration(database: Database, like: str) -> None:
    for line in map(measured, database.manifest.values["calibration"][like]):
        effort = line.effort
        print(
            f"recall@{line.k} {line.recall:.4f} [{line.low:.4f}, {line.high:.4f}] on {line.queries} {like} "
            f"with {effort.probes} partitions, {effort.lists} lists, {effort.candidates} candidates"
        )


def _table(answer: Answer) -> str:
    titles = f"{'rank':>4}  {'similarity':>10}  {'image_id':>20}  {'caption':{CAPTION_WIDTH}}  url  credit"
    lines = [plain(answer.query), titles]
    for row in answer.neighbors:
        caption = plain(row["caption"])[:CAPTION_WIDTH]
        lines.append(
            f"{row['rank']:4}  {row['similarity']:10.4f}  {row['image_id']:20}  "
            f"{caption:{CAPTION_WIDTH}}  {plain(row['url'])}  {plain(credit(row))}".rstrip()
        )
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _blocked_id(line: str) -> int:
    """An id is a whole number; an address stands for the id that is made of it."""
    if "://" in line:
        return image_id(line)
    try:
        return int(np.int64(line))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{line!r} is neither an image id nor an address such as https://…") from error


def _named(pair: str) -> tuple[str, str]:
    field, equals, name = pair.partition("=")
    if not equals:
        raise UserError(f"--column {pair!r}: wanted FIELD=NAME, as in caption=TITLE")
    return field, name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a UserError is told without its traceback."""
    commands = {
        "search": search,
        "info": info,
        "verify": verify,
        "build": build,
        "block": hide,
        "calibrate": calibrate,
        "card": describe,
    }
    arguments = parser(commands).parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
