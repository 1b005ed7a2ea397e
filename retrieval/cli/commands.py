"""Commands on databases: `python -m retrieval COMMAND DB` and `laion-rdm COMMAND DB` call `main`.

Exit codes: 0; 1 if `verify` found damage or no signature; 2 for a UserError, printed without a traceback.
"""

import json
import logging
import math
import os
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from retrieval.cli.arguments import make_parser
from retrieval.cli.card import card
from retrieval.cli.contact_sheet import QueryResult, credit, printable, query_results, write_contact_sheet
from retrieval.cli.queries import QueryInputs, encode_queries, read_vectors
from retrieval.cli.signed_picture import print_signature
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.calibration import recalibrate
from retrieval.database.database import Database
from retrieval.database.stored_manifest import database_manifest
from retrieval.database.verify import RecallSample, damaged_files, measure_recall, visible_positions
from retrieval.errors import UserError
from retrieval.extras import extras_named
from retrieval.imports.importer import build_database, vector_dim
from retrieval.imports.source import SourceColumns, VectorSource
from retrieval.index.hidden import Ids, hide
from retrieval.recipe import IndexConfig, StorageConfig
from retrieval.storage.root import Root
from retrieval.storage.schema import image_id
from retrieval.updates.add import add_to_database
from retrieval.updates.delete import delete_from_database
from retrieval.updates.merge import merge_databases

DAMAGED, USER_ERROR = 1, 2
CAPTION_WIDTH = 50
"""Characters of a caption in the table that `search` prints."""


def search(arguments: Namespace) -> int:
    """Search for texts, pictures or vectors; print the neighbors or draw them."""
    database = Database.open(_root(arguments))
    if arguments.where is not None:
        database = database.where(arguments.where)
    inputs = QueryInputs(arguments.texts, arguments.image, arguments.vector, arguments.clip, arguments.pretrained)
    results = []
    for queries in encode_queries(inputs, database, arguments.like):
        neighbors = database.search(queries.vectors, arguments.k, recall=arguments.recall, like=queries.like)
        results += query_results(queries.names, neighbors)
    if arguments.sheet:
        num_pictures = write_contact_sheet(arguments.sheet, results, arguments.pictures)
        print(f"{arguments.sheet}: {num_pictures} pictures found below {arguments.pictures}", file=sys.stderr)
    if arguments.json:
        print(
            json.dumps([_json_object(result) for result in results], indent=1, ensure_ascii=False, default=_json_time)
        )
    else:
        print("\n\n".join(_table(result) for result in results))
    return 0


def info(arguments: Namespace) -> int:
    """Print size, encoder, settings and measured recall."""
    database = Database.open(_root(arguments))
    manifest = database.manifest
    rows = database.partition_rows
    facts = {
        "rows": len(database),
        "hidden": len(database) - len(visible_positions(database)),
        "dim": database.dim,
        "encoder": database.encoder.model,
        "weights": database.encoder.weights or "unknown",
        "partitions": len(rows),
        "rows per partition": [int(rows.min()), int(rows.max())],
        "bytes": manifest.bytes,
        "left out": manifest.reasons,
        "changed values": manifest.values.get("changed_values", {}),
        "settings": manifest.config,
        "built from": manifest.upstream,
        "schema version": manifest.schema_version,
    }
    if arguments.json:
        calibration = {kind: [asdict(entry) for entry in entries] for kind, entries in database.calibration.items()}
        print(json.dumps({**facts, "calibration": calibration}, indent=1))
        return 0
    for key, value in facts.items():
        print(f"{key:18} {value:,}" if isinstance(value, int) else f"{key:18} {value}")
    for kind in database.calibration:
        _print_calibration(database, kind)
    return 0


def verify(arguments: Namespace) -> int:
    """Check a database's files and recall, or the signed statement in a picture."""
    if Path(arguments.database).is_file():
        return 0 if print_signature(Path(arguments.database), arguments.authorities) else DAMAGED
    root = _root(arguments)
    manifest = database_manifest(root)
    if damaged := damaged_files(root):
        print("\n".join(f"damaged: {line}" for line in damaged))
        return DAMAGED
    print(f"{len(manifest.checksums())} files match the manifest")
    sample = RecallSample(arguments.queries, arguments.k, arguments.recall, arguments.seed)
    print(f"{measure_recall(Database.open(root), sample)}, requested {arguments.recall}")
    return 0


def build(arguments: Namespace) -> int:
    """Build a database from vectors of another tool."""
    source = _source(arguments, arguments.texts)
    try:
        settings = {name: vars(arguments)[name] for name in ("rows_per_partition", "index_key", "store")}
        config = IndexConfig.model_validate(settings)
    except ValidationError as error:
        raise _invalid_option(error) from error
    dim = vector_dim(source)
    encoder = EncoderIdentity(model=arguments.model, weights=arguments.weights, preprocessing="", dim=dim)
    manifest = build_database(_root(arguments), source, encoder=encoder, config=config).manifest
    print(f"{arguments.database}: {manifest.rows:,} rows of dim {dim}{_counts(manifest.reasons)}")
    for name, count in manifest.values.get("changed_values", {}).items():
        print(f"column {name}: {count:,} values unusable or cleaned")
    return 0


def add(arguments: Namespace) -> int:
    """Add vectors to a database."""
    before = database_manifest(_root(arguments))
    after = add_to_database(_root(arguments), _source(arguments, None)).manifest
    added = after.rows - before.rows
    left_out = Counter(after.reasons) - Counter(before.reasons)
    print(f"{arguments.database}: {added:,} rows added{_counts(left_out)}; {after.rows:,} rows in total")
    return 0


def delete(arguments: Namespace) -> int:
    """Delete images from all files of a database."""
    ids = _listed_ids(arguments.ids)
    before = database_manifest(_root(arguments)).rows
    after = delete_from_database(_root(arguments), ids).manifest.rows
    print(f"{arguments.database}: {before - after:,} rows deleted for {len(ids):,} ids; {after:,} rows are left")
    return 0


def merge(arguments: Namespace) -> int:
    """Merge databases of one encoder into a new one."""
    database = merge_databases(_root(arguments), [_root(arguments, url) for url in arguments.sources])
    print(f"{arguments.database}: {len(database):,} rows of {len(arguments.sources)} databases")
    return 0


def hide_images(arguments: Namespace) -> int:
    """Hide images from all searches, without a new build."""
    print(f"{hide(_root(arguments), _listed_ids(arguments.ids))} image ids are hidden")
    return 0


def calibrate(arguments: Namespace) -> int:
    """Measure the recall of each effort, on your own queries or on rows of the database, and store it."""
    root = _root(arguments)
    queries = None if arguments.queries is None else read_vectors(arguments.queries)
    recalibrate(root, queries, arguments.like)
    _print_calibration(Database.open(root), arguments.like)
    return 0


def describe(arguments: Namespace) -> int:
    """Print the database's card, or write it as README.md."""
    text = card(Database.open(_root(arguments)), datetime.now(UTC).date())
    if arguments.write:
        _root(arguments).write_bytes("README.md", text.encode())
    else:
        print(text)
    return 0


def _print_calibration(database: Database, kind: str) -> None:
    for entry in database.calibration[kind]:
        effort = entry.effort
        if entry.is_exact:
            print(f"recall@{entry.k} 1 for {kind} by comparing all rows")
            continue
        print(
            f"recall@{entry.k} {entry.recall:.4f} [{entry.low:.4f}, {entry.high:.4f}] "
            f"on {entry.queries} {kind} with {effort.partitions_per_query} partitions, "
            f"{effort.lists_per_partition} lists, {effort.candidates_per_result} candidates"
        )


def _table(result: QueryResult) -> str:
    titles = f"{'rank':>4}  {'similarity':>10}  {'image_id':>20}  {'caption':{CAPTION_WIDTH}}  url  credit"
    lines = [printable(result.query), titles]
    for row in result.neighbors:
        caption = printable(row["caption"])[:CAPTION_WIDTH]
        lines.append(
            f"{row['rank']:4}  {row['similarity']:10.4f}  {row['image_id']:20}  "
            f"{caption:{CAPTION_WIDTH}}  {printable(row['url'])}  {printable(credit(row))}".rstrip()
        )
    return "\n".join(lines)


def _json_object(result: QueryResult) -> dict[str, Any]:
    """A result as JSON has it: numbers that are not finite are null."""
    rows = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in result.neighbors
    ]
    return {"query": result.query, "neighbors": rows}


def _json_time(value: Any) -> str:
    """The text of a value that JSON does not have: days and times in ISO 8601."""
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _root(arguments: Namespace, url: str = "") -> Root:
    """The folder of the database, or another one, with the cache of the options."""
    try:
        storage = StorageConfig(cache_folder=arguments.cache_folder, cache_gb=arguments.cache_gb)
    except ValidationError as error:
        raise _invalid_option(error) from error
    return Root(url or arguments.database, cache=(storage.cache_folder, storage.cache_gb))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _source(arguments: Namespace, text_queries: str | None) -> VectorSource:
    columns = dict(_column_name(pair) for pair in arguments.column)
    try:
        return VectorSource(
            arguments.source, arguments.metadata, SourceColumns(**columns), arguments.part, text_queries
        )
    except ValidationError as error:
        raise _invalid_option(error) from error


def _invalid_option(error: ValidationError) -> UserError:
    problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return UserError(f"invalid option: {'; '.join(problems)}")


def _counts(reasons: Mapping[str, int]) -> str:
    return "".join(f", {count:,} {word}" for word, count in sorted(reasons.items()))


def _listed_ids(path: Path) -> Ids:
    return np.array([_listed_id(line) for line in _lines(path)], np.int64)


def _listed_id(line: str) -> int:
    """The image id in a line: a whole number, or a URL, which determines the id."""
    if "://" in line:
        return image_id(line)
    try:
        return int(np.int64(line))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{line!r} is neither an image id nor a URL such as https://...") from error


def _column_name(pair: str) -> tuple[str, str]:
    field, equals, name = pair.partition("=")
    if not equals:
        raise UserError(f"--column {pair!r}: expected FIELD=NAME, as in caption=TITLE")
    return field, name


COMMANDS = {
    "search": search,
    "info": info,
    "verify": verify,
    "build": build,
    "add": add,
    "delete": delete,
    "merge": merge,
    "hide": hide_images,
    "calibrate": calibrate,
    "card": describe,
}


@contextmanager
def _messages() -> Iterator[None]:
    """Print the steps of builds, updates and calibrations, which can take hours, and warnings without lines of code."""
    default = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **line: f"warning: {message}\n"
    log, handler = logging.getLogger("database"), logging.StreamHandler()
    level = log.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        warnings.formatwarning = default


def main(argv: Sequence[str] | None = None, prog: str = "laion-rdm") -> int:
    """Run one command and return the exit code. prog: the program's name in the help text."""
    arguments = make_parser(prog, COMMANDS).parse_args(argv)
    try:
        with extras_named(), _messages():
            return int(arguments.run(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
