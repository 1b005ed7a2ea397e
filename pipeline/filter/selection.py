"""The rules of `filter`: which rows are kept, and for which split. Reads and writes no files.

Takes batches of LAION columns; returns the image id of each row, the reason if it is dropped, and whether it can be
used for training. Rows with equal ids are in the same bucket, where duplicates are found. If one row of a URL is
unsafe, the URL is dropped; if one has a watermark, the URL is not for training. The training quota selects the rows
with the lowest seeded hash of their id, so the order and division of the input have no effect.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filter.thresholds import dropped_rows, threshold_columns
from pipeline.recipe import FilterConfig
from pipeline.web.blocklist import Blocklist
from pipeline.web.urls import canonical_column, hash_urls
from retrieval.storage.arrow_columns import is_text, numbers, pixels, texts
from retrieval.storage.schema import Reason

RULE_COLUMNS = ("url", "width", "height", "pwatermark", "punsafe")
NO_LIMIT = (1 << 64) - 1
NO_VALUE = pa.array(["", "nan", "none", "null", "na", "n/a"])
"""Texts in place of a score that is missing, in any case."""

KEY_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("check", pa.uint32(), nullable=False),
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("train", pa.bool_(), nullable=False),
        pa.field("unsafe", pa.bool_(), nullable=False),
        pa.field("watermarked", pa.bool_(), nullable=False),
    ]
)
"""A row that no rule drops (kept), or a dropped row that decides about others of its URL: it is unsafe or watermarked.
check: 32 more bits of the URL's hash; row: its number within the piece; train: its size and watermark allow training.
"""

CORRECTED_URL_SCHEMA = pa.schema(
    [pa.field("row", pa.uint32(), nullable=False), pa.field("url", pa.string(), nullable=False)]
)
"""Rows with a URL that was not canonical, and the canonical URL. row: number within the piece, ascending."""

AS_IT_IS, DUPLICATE, UNSAFE, TO_DATABASE = np.arange(4, dtype=np.uint8)
"""Effect of the other rows of its URL on a row: none, two reasons to drop it, or not to train on it."""

Decisions = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Rules:
    """The settings and the blocklist."""

    config: FilterConfig
    blocklist: Blocklist


def rule_columns(config: FilterConfig) -> tuple[str, ...]:
    """The columns that `apply_rules` reads."""
    return tuple(dict.fromkeys((*RULE_COLUMNS, *threshold_columns(config))))


def apply_rules(batch: pa.RecordBatch, first_row: int, rules: Rules) -> tuple[pa.Table, pa.RecordBatch, dict[str, int]]:
    """Apply the rules to a batch with the columns `rule_columns`.

    Returns the keys (KEY_SCHEMA), corrected URLs (CORRECTED_URL_SCHEMA), and numbers of dropped rows by reason.
    """
    config, original = rules.config, texts(batch["url"])
    urls = canonical_column(original)
    width, height = pixels(batch["width"]), pixels(batch["height"])
    unknown_size = (width < 1) | (height < 1)
    unsafe, unsafe_known = _score(batch["punsafe"], config.missing_safety == "keep")
    watermark, watermark_known = _score(batch["pwatermark"], config.missing_watermark == "keep")
    is_url = urls.is_valid().to_numpy(zero_copy_only=False)
    is_unsafe = unsafe_known & (unsafe >= config.max_unsafe)
    has_watermark = watermark_known & (watermark >= config.max_watermark)
    drops = [
        (Reason.BAD_URL, ~is_url),
        (Reason.BAD_SIZE, unknown_size & (config.missing_size == "drop")),
        (Reason.NO_SCORE, ~(unsafe_known & watermark_known)),
        (Reason.UNSAFE, is_unsafe),
        *dropped_rows(batch, config),
    ]
    drop_code = np.select([mask for _, mask in drops], [*range(1, len(drops) + 1)], default=0)
    train = ((np.minimum(width, height) >= config.min_edge) | unknown_size) & ~has_watermark
    rows = np.flatnonzero((drop_code == 0) | (is_url & (is_unsafe | has_watermark)))
    hashed = urls.take(pa.array(rows))
    ids, check = hash_urls(hashed)
    listed = rules.blocklist.blocks_ids(ids) | rules.blocklist.blocks_hosts(hashed)
    drop_code[rows[listed & (drop_code[rows] == 0)]] = len(drops) + 1
    in_sample = _in_sample(ids, config)
    drop_code[rows[~in_sample & (drop_code[rows] == 0)]] = len(drops) + 2
    reasons = _counts(drop_code, [*(reason for reason, _ in drops), Reason.BLOCKED, Reason.NOT_SAMPLED])
    masks = [drop_code[rows] == 0, train[rows], is_unsafe[rows], has_watermark[rows]]
    columns = [ids, check, (rows + first_row).astype(np.uint32), *masks]
    keys = pa.table(columns, schema=KEY_SCHEMA)
    keys = keys if in_sample.all() else keys.filter(pa.array(in_sample))
    return keys, _corrected_urls(original, urls, first_row), reasons


def _in_sample(ids: Ids, config: FilterConfig) -> Mask:
    """Which ids are in the sample: those with the lowest ranks. All rows of a URL are in it, or none."""
    if config.sample == 1:
        return np.ones(len(ids), bool)
    return np.asarray(training_ranks(ids, config.seed) <= np.uint64(config.sample * (1 << 64)))


def _counts(drop_code: npt.NDArray[np.int64], reasons: list[Reason]) -> dict[str, int]:
    """Number of rows by reason. drop_code: 0 for a kept row, else 1 + the index of its reason."""
    counts: Counter[str] = Counter()
    for reason, count in zip(reasons, np.bincount(drop_code, minlength=len(reasons) + 1)[1:].tolist(), strict=True):
        counts[str(reason)] += count
    return {reason: count for reason, count in counts.items() if count}


def _corrected_urls(original: pa.StringArray, urls: pa.StringArray, first_row: int) -> pa.RecordBatch:
    rows = np.flatnonzero(pc.fill_null(pc.not_equal(urls, original), False).to_numpy(zero_copy_only=False))
    return pa.record_batch(
        [(rows + first_row).astype(np.uint32), urls.take(pa.array(rows))], schema=CORRECTED_URL_SCHEMA
    )


def _score(column: pa.Array, keep_missing: bool) -> tuple[npt.NDArray[np.float64], Mask]:
    """The scores, 0 if missing, and which rows have one or need none. A text such as `0,9` is neither."""
    values = numbers(column)
    known = values.is_valid().to_numpy(zero_copy_only=False)
    filled = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
    return filled, known | _is_missing(column) if keep_missing else known


def _is_missing(column: pa.Array) -> Mask:
    """Which rows have no value: null, NaN or a text of NO_VALUE."""
    if is_text(column.type):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(texts(column, errors="replace"), "")))
        missing = pc.is_in(text, NO_VALUE)
    else:
        missing = column.cast(pa.float64(), safe=False).is_null(nan_is_null=True)
    return np.asarray(missing.to_numpy(zero_copy_only=False), bool)


def split_into_buckets(keys: pa.Table, num_buckets: int) -> list[pa.RecordBatch]:
    """The keys divided by image id, in their order within each bucket. num_buckets: a power of two."""
    bucket = keys["image_id"].to_numpy().view(np.uint64) & np.uint64(num_buckets - 1)
    return split_rows(keys, bucket.astype(np.int64), num_buckets)


def split_rows(table: pa.Table, part: npt.NDArray[np.int64], num_parts: int) -> list[pa.RecordBatch]:
    """The rows of a table divided by part number, in their order within each part."""
    narrow = part.astype(np.min_scalar_type(num_parts))  # NumPy sorts integers of 16 bits ten times faster
    ordered = table.take(pa.array(np.argsort(narrow, kind="stable"))).combine_chunks()
    ends = np.cumsum(np.bincount(part, minlength=num_parts))
    starts = np.concatenate([[0], ends[:-1]])
    whole = ordered.to_batches()[0] if ordered.num_rows else pa.RecordBatch.from_pylist([], table.schema)
    return [whole.slice(start, end - start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def compare_rows(keys: pa.Table) -> tuple[Decisions, int]:
    """What the other rows of its URL decide about each row of KEY_SCHEMA, and the number of colliding ids.

    Of the kept rows with an id the first stays. An id is unsafe if any of its rows is, and not for training if any of
    its rows has a watermark. Returns AS_IT_IS, DUPLICATE, UNSAFE or TO_DATABASE for each kept row.
    """
    all_ids, check = keys["image_id"].to_numpy(), keys["check"].to_numpy()
    rows = _repeated(all_ids)
    ids = all_ids[rows]
    kept, unsafe, watermarked = (keys[name].to_numpy()[rows] for name in ("kept", "unsafe", "watermarked"))
    decisions = np.full(len(rows), AS_IT_IS)
    decisions[np.isin(ids, ids[watermarked])] = TO_DATABASE
    order = np.flatnonzero(kept)
    order = order[np.argsort(ids[order], kind="stable")]
    same = ids[order[1:]] == ids[order[:-1]]
    decisions[order[1:][same]] = DUPLICATE
    decisions[np.isin(ids, ids[unsafe])] = UNSAFE
    result = np.full(len(all_ids), AS_IT_IS)
    result[rows[kept]] = decisions[kept]
    check = check[rows]
    return result, int((same & (check[order[1:]] != check[order[:-1]])).sum())


def _repeated(ids: Ids) -> npt.NDArray[np.int64]:
    """Numbers of the rows with an id that another row has too, ascending."""
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(pc.is_in(pa.array(ids), pa.array(repeated)).to_numpy(zero_copy_only=False))


def training_ranks(ids: Ids, seed: int) -> Ranks:
    """A seeded one-to-one hash of the 64-bit ids (finalizer of splitmix64). The lowest are sampled, or train."""
    mixed = ids.view(np.uint64) ^ np.uint64(int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:8]))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def rank_threshold(parts: Callable[[], Iterable[Ranks]], count: int) -> int:
    """The highest of the `count` lowest ranks; NO_LIMIT if there are at most `count` ranks.

    parts: yields the ranks in arrays. It is called twice, so that only one array and one histogram are in memory.
    """
    histogram = np.zeros(1 << 16, np.int64)
    for part in parts():
        histogram += np.bincount((part >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    below = np.cumsum(histogram)
    if below[-1] <= count:
        return NO_LIMIT
    bin_ = int(np.searchsorted(below, count))
    inside = np.sort(np.concatenate([part[part >> np.uint64(48) == bin_] for part in parts()]))
    return int(inside[count - 1 - (int(below[bin_ - 1]) if bin_ else 0)])
