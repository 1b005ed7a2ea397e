import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.web.blocklist import read_blocklist
from pipeline.web.urls import canonical_column
from retrieval.errors import UserError
from retrieval.storage.schema import image_id

URL = "http://example.org/a.jpg"


def test_a_list_blocks_urls_ids_domains_and_subdomains(tmp_path: Path) -> None:
    other = image_id("http://example.org/b.jpg")
    third = image_id("http://example.org/c.jpg")
    lines = [
        "# requested by mail",
        "",
        "HTTP://EXAMPLE.org/a.jpg#x",
        f"{other & (2**64 - 1):016x}",
        str(third),
        "Blocked.example",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    blocklist = read_blocklist(str(tmp_path / "list.txt"))
    ids = np.array([image_id(URL), other, third, image_id("http://example.org/d.jpg")])
    assert blocklist.blocks_ids(ids).tolist() == [True, True, True, False]
    urls = pa.array(
        [
            "http://blocked.example/",
            "https://img.blocked.example:8080/a",
            "http://notblocked.example/",
            "http://a.org/blocked.example/",
        ]
    )
    assert blocklist.blocks_hosts(urls).tolist() == [True, True, False, False]


def test_contents_and_pictures_are_listed_by_their_hashes(tmp_path: Path) -> None:
    lines = [f"MD5:{hashlib.md5(b'one').hexdigest()}", f"sha256:{hashlib.sha256(b'two').hexdigest()}"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "phash:f000000000000001"]))
    blocklist = read_blocklist(str(tmp_path / "list.txt"))
    assert [blocklist.blocks_content(body) for body in (b"one", b"two", b"three")] == [True, True, False]
    listed = np.array([0xF000000000000001], np.uint64)
    flips = np.array([0, 0b111111 << 20, 0b1111111 << 20], np.uint64)
    hashes = (listed ^ flips).view(np.int64)
    assert blocklist.blocks_phashes(hashes).tolist() == [True, True, False]
    assert not blocklist.blocks_ids(hashes).any()


def blocked(tmp_path: Path, content: bytes, urls: list[str]) -> list[str]:
    """The canonical spellings of the URLs that a list blocks, for single URLs and for columns alike."""
    (tmp_path / "list.txt").write_bytes(content)
    blocklist = read_blocklist(str(tmp_path / "list.txt"))
    column = canonical_column(pa.array(urls))
    ids = np.array([image_id(url) for url in column.to_pylist()])
    matches = blocklist.blocks_hosts(column) | blocklist.blocks_ids(ids)
    assert [blocklist.blocks_url(url) for url in column.to_pylist()] == matches.tolist()
    return [url for url, match in zip(column.to_pylist(), matches, strict=True) if match]


@pytest.mark.parametrize(
    "entry",
    [
        "example.org",
        "EXAMPLE.ORG.",
        "  *.example.org",
        ".example.org",
        "example.org:443",
        "example.org/",
        "https://example.org",
        "http://example.org/#about",
        "\ufeffexample.org\r",
        "ｅxample。org",
    ],
)
def test_every_spelling_of_a_domain_blocks_every_spelling_of_its_urls(tmp_path: Path, entry: str) -> None:
    urls = [
        "http://example.org./a",
        "https://img.EXAMPLE.org:8080/b",
        "http://example.org/",
        "https://example.org:443/c",
    ]
    others = ["http://notexample.org/", "http://example.org.uk/a", "http://org/a"]
    assert len(blocked(tmp_path, entry.encode(), [*urls, *others])) == len(urls)


def test_a_domain_in_another_script_equals_its_ascii_spelling(tmp_path: Path) -> None:
    urls = ["http://faß.example/", "http://xn--fa-hia.example/a", "https://img.FAẞ.example/"]
    for entry in ("faß.example", "*.xn--fa-hia.example"):
        assert len(blocked(tmp_path, entry.encode(), [*urls, "http://fass.example/"])) == len(urls)


def test_a_port_restricts_a_domain_and_addresses_are_domains(tmp_path: Path) -> None:
    content = b"example.org:8080\n[2001:DB8::1]\n192.0.2.1\n"
    urls = ["http://a.example.org:8080/", "http://[2001:db8::1]:81/", "http://192.0.2.1/"]
    others = ["http://example.org/", "http://example.org:8081/", "http://[2001:db8::2]/"]
    assert blocked(tmp_path, content, [*urls, *others]) == urls


@pytest.mark.parametrize(
    ("entry", "twin"),
    [
        ("https://example.org/a.jpg", "http://example.org/a.jpg"),
        ("HTTP://example.org.:80/a.jpg", "https://example.org:443/a.jpg"),
        ("http://example.org:8080/a.jpg", "https://example.org:8080/a.jpg"),
        ("https://example.org?x=1", "http://example.org/?x=1"),
    ],
)
def test_a_url_blocks_the_same_url_of_http_and_https(tmp_path: Path, entry: str, twin: str) -> None:
    assert len(blocked(tmp_path, entry.encode(), [entry, twin, "http://example.org/b.jpg"])) == 2


def test_byte_order_marks_of_any_editor_and_of_joined_files_are_skipped(tmp_path: Path) -> None:
    urls = ["http://example.org/", "http://foo.example/"]
    for content in ("\ufeffexample.org\r\n\ufefffoo.example\r\n".encode(), "example.org\rfoo.example".encode("utf-16")):
        assert blocked(tmp_path, content, urls) == urls


@pytest.mark.parametrize(
    "line",
    [
        b"http://example.org/caf\xe9.jpg",
        b"example.org/a.jpg",
        b"*example.org",
        b"http://*.example.org/a.jpg",
        b"ftp://example.org",
        b"someone@example.org",
        b"a b.example.org",
        b"0.0.0.0 example.org",
        b"md5:123",
        b"99999999999999999999",
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(b"# one\n" + line + b"\n")
    with pytest.raises(UserError, match="line 2: "):
        read_blocklist(str(tmp_path / "list.txt"))


def test_an_absent_list_blocks_nothing() -> None:
    assert not read_blocklist("").blocks_ids(np.array([1, 2])).any()


def test_an_invalid_line_is_reported_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("example.org\nwhat is this\n")
    with pytest.raises(UserError, match=r"line 2: 'what is this'"):
        read_blocklist(str(tmp_path / "list.txt"))


def test_a_missing_list_is_an_error_and_not_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"filter\.blocklist"):
        read_blocklist(str(tmp_path / "absent.txt"))
