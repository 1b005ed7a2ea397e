"""A fetcher for tests, one URL fetched to its end as a worker does it, and a shard of URLs to download."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.web.fetch import Fetcher, Manners
from pipeline.web.host_queue import Courtesy, Turns
from pipeline.web.sockets import Refusal
from retrieval.storage.root import Root
from retrieval.storage.schema import SELECTED, image_id, write_table

COURTESY = Courtesy(connections=4, pause_s=0.0, patience_s=5.0)


def fetcher(**changes: object) -> Fetcher:
    manners = {
        "user_agent": "laion-rdm",
        "contact": "https://example.org/us",
        "access": "loopback",
        "timeout_s": 1.0,
        "deadline_s": 4.0,
        "retries": 0,
        "max_bytes": 100_000,
        "connections": 4,
        "courtesy": COURTESY,
    }
    return Fetcher(Manners(**(manners | changes)))


def turns(urls: Sequence[str], **changes: object) -> Turns:
    return Turns(enumerate(urls), Courtesy(**(vars(COURTESY) | changes)), {})  # type: ignore[arg-type]


def fetched(one: Fetcher, url: str) -> bytes | Refusal:
    waiting = turns([url])
    while True:
        errand, refusal = waiting.take()
        found = refusal or one.serve(errand, waiting)
        if found is not None:
            return found


def write_selected(root: Root, shard: str, urls: Sequence[str]) -> None:
    """What filter leaves of a shard."""
    rows = {
        "image_id": [image_id(url) for url in urls],
        "url": urls,
        "caption": [f"caption {n}" for n in range(len(urls))],
        "width": [9] * len(urls),
        "height": [9] * len(urls),
    }
    columns = [pa.array(rows.get(field.name, [None] * len(urls)), field.type) for field in SELECTED]
    write_table(root, f"filter/{shard}.parquet", pa.table(columns, schema=SELECTED), SELECTED)
