"""Each kind of entry of a list finds exactly the stored pictures that it names."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.download.shard_update import listed_rows
from pipeline.optout.search import ListSearch
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Workers
from pipeline.web.blocklist import read_blocklist
from retrieval import Root
from retrieval.config import Config
from retrieval.storage import schema
from tests.pipeline.conftest import Picture, write_download

MD5, SHA256 = f"md5:{7:032x}", f"sha256:{8:064x}"
ELSEWHERE = Picture("http://example.net/other.jpg", 1, phash=0x0F0F0F0F00000000)
PICTURES = {
    "example.org": Picture("http://example.org/domain.jpg", 2),
    "*.example.com": Picture("http://images.example.com/subdomain.jpg", 3),
    "http://example.net/url.jpg": Picture("http://example.net/url.jpg", 4),
    str(schema.image_id("http://example.net/id.jpg")): Picture("http://example.net/id.jpg", 5),
    MD5.upper(): Picture("http://example.net/md5.jpg", 6, checksum=MD5),
    SHA256: Picture("http://example.net/sha256.jpg", 8),
    f"sha256:{9:064x}": Picture("http://example.net/stated.jpg", 10, checksum=f"sha256:{9:064x}"),
    "phash:700000000000000f": Picture("http://example.net/phash.jpg", 11, phash=0x7000000000000001),
}


def kind_of(entry: str) -> str:
    """The kind of an entry, as reports name it."""
    if entry.lower().startswith(("md5:", "sha256:")):
        return "md5 or sha256"
    if entry.startswith("phash:"):
        return "phash"
    return "domain" if entry.endswith((".org", ".com")) else "URL or id"


@pytest.mark.usefixtures("in_process_shards")
def test_each_kind_of_entry_finds_the_pictures_that_it_names_and_no_others(tmp_path: Path) -> None:
    root, path = Root(tmp_path / "run"), tmp_path / "list.txt"
    others = [replace(ELSEWHERE, url=f"{ELSEWHERE.url}?{n}", seed=100 + n, checksum=f"md5:{n:032x}") for n in range(3)]
    write_download(root, {"train/00000": [*PICTURES.values(), *others], "train/00001": others[:1]})
    table = schema.read_table(root, "download/train/00000.parquet", schema.DOWNLOADED)
    for number, (entry, picture) in enumerate(PICTURES.items()):
        path.write_text(f"{entry}\n")
        blocklist = read_blocklist(str(path))
        stage = Stage(root, f"optout/{blocklist.identity}", 1, Config(), {"list": blocklist.identity})
        with stage.building():
            found = ListSearch.prepared(stage, blocklist, [], Workers(1)).pictures()
        assert (found.ids.tolist(), found.shards) == ([schema.image_id(picture.url)], ["train/00000"]), entry
        assert found.matches == {kind_of(entry): 1}, entry
        assert [*listed_rows(table, blocklist)] == [number], entry
