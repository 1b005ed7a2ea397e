"""The page of `laion-rdm view`: one HTML file with all pictures in it, which loads nothing from the network.

Captions, URLs, messages and licenses are untrusted text: the template escapes every value.
"""

from pathlib import Path

from jobs.reporting.charts import Bar
from jobs.reporting.page import render
from jobs.view.neighbors import neighbor_queries
from jobs.view.samples import sample_split, shard_names
from pipeline.runtime.status import StageSpec, Status, find_manifest, stage_status
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root

TEMPLATE = Path(__file__).with_name("page.html.jinja")
STAGES = ("filter", "download", "embed", "neighbors")
"""The stages that leave rows out."""


def view_page(root: Root, prefix: str, num_pictures: int, seed: int, now: float) -> str:
    """The page for the shards that begin with a prefix. num_pictures: of a split; now: in seconds since 1970.

    Raises UserError if no shard begins so.
    """
    manifests = {stage: find_manifest(root, stage) for stage in STAGES}
    names = shard_names(root, manifests["download"])
    by_split = {split: [name for name in names if name.startswith(f"{split}/")] for split in schema.SPLITS}
    samples = [
        sample_split(root, split, matches, num_pictures, seed)
        for split, shards in by_split.items()
        if (matches := [name for name in shards if name.startswith(prefix)])
    ]
    if not samples:
        raise UserError(
            f"{root.at('download')} has no finished shard that begins with {prefix!r}; it has {len(names):,}, such as"
            f" {names[0]}. Name one of them, or leave out --shard for a choice of all."
        )
    statuses = [stage_status(root, StageSpec(stage, stage, None), manifests[stage], {}, now) for stage in STAGES]
    training = [row for sample in samples if sample.split == "train" for row in sample.stored]
    joined = manifests["neighbors"]
    content = {
        "root": root.url,
        "prefix": prefix,
        "seed": seed,
        "samples": samples,
        "statuses": [(status, reason_bars(status)) for status in statuses if status.state != "not started"],
        "queries": joined and neighbor_queries(root, joined, training, by_split["database"], seed),
    }
    return render(TEMPLATE, content)


def reason_bars(status: Status) -> list[Bar]:
    """One bar for each reason of a stage, the most frequent first, which is the longest."""
    longest, total = max(status.reasons.values(), default=1), status.rows + sum(status.reasons.values())
    counts = status.reasons.items()
    return [Bar(reason, 100 * count / longest, f"{count:,}  {count / total:.2%}") for reason, count in counts]
