import pyarrow as pa
import pytest

from pipeline.web.urls import MAX_URL_CHARS, canonical_column, canonical_url, hash_urls, host_name, url_ids
from retrieval.kernel import texts
from retrieval.storage.schema import image_id

SPELLINGS = [
    ("http://example.org/a.jpg", "http://example.org/a.jpg"),
    ("HTTPS://Example.ORG/A.jpg", "https://example.org/A.jpg"),
    ("  http://example.org/a.jpg\n", "http://example.org/a.jpg"),
    ("http://example.org", "http://example.org/"),
    ("http://example.org?x=1", "http://example.org/?x=1"),
    ("http://example.org/a?", "http://example.org/a?"),
    ("http://example.org:80/a", "http://example.org/a"),
    ("https://example.org:443/a", "https://example.org/a"),
    ("https://example.org:80/a", "https://example.org:80/a"),
    ("http://example.org:08080/a", "http://example.org:8080/a"),
    ("http://example.org:/a", "http://example.org/a"),
    ("http://example.org/a#fragment?no=query", "http://example.org/a"),
    ("http://example.org/a b|c", "http://example.org/a%20b%7Cc"),
    ("http://example.org/a%20b%7c", "http://example.org/a%20b%7c"),
    ("http://example.org/größe.jpg?q=é", "http://example.org/gr%C3%B6%C3%9Fe.jpg?q=%C3%A9"),
    ("http://bücher.example/a", "http://xn--bcher-kva.example/a"),
    ("http://example.org./a", "http://example.org/a"),
    ("http://faß.example/", "http://xn--fa-hia.example/"),
    ("http://fass.example/", "http://fass.example/"),
    ("http://FAẞ.example/", "http://xn--fa-hia.example/"),
    ("http://βόλος.example/", "http://xn--nxasmm1c.example/"),
    ("http://☃.example/", "http://xn--n3h.example/"),
    ("http://ａ。b．example/", "http://a.b.example/"),
    ("http://a_b--c.bü_cher.example/", "http://a_b--c.xn--b_cher-3ya.example/"),
    ("http://[2001:DB8::0:1]:8080/a", "http://[2001:db8::1]:8080/a"),
    ("http://127.0.0.1:59999/a", "http://127.0.0.1:59999/a"),
    ("http://127.0.0.1:65535/a", "http://127.0.0.1:65535/a"),
]
REFUSED = [
    "",
    "example.org/a.jpg",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "ftp://example.org/a",
    "javascript:alert(1)",
    "http:///a.jpg",
    "http:example.org/a",
    "http://user:secret@example.org/a",
    "http://user@example.org/a",
    "http://example.org\\@127.0.0.1/a",
    "http://example.org/a\tb",
    "http://example.org/a\0",
    "http://example.org/a\x85b",
    "http://example.org:0/a",
    "http://example.org:65536/a",
    "http://example.org:port/a",
    "http://example.org:" + "9" * 5000 + "/a",
    "http://exa mple.org/a",
    "http://ex%61mple.org/a",
    "http://a..example/",
    "http://.example.org/",
    "http://example.org../",
    "http://" + "a" * 64 + ".org/",
    "http://a\ufffd.example/",
    "http://ä／b.example/",
    "http://[fe80::1%25eth0]/a",
    "http://[::1/a",
    "http://" + "ä" * 70 + ".org/a",
    "http://example.org/\ud800",
    "http://example.org/" + "a" * MAX_URL_CHARS,
]


@pytest.mark.parametrize(("url", "expected"), SPELLINGS)
def test_a_url_gets_its_canonical_spelling(url: str, expected: str) -> None:
    assert canonical_url(url) == expected


@pytest.mark.parametrize(("url", "expected"), SPELLINGS)
def test_a_canonical_url_does_not_change(url: str, expected: str) -> None:
    assert canonical_url(expected) == expected


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_must_not_be_fetched_has_no_canonical_spelling(url: str) -> None:
    assert canonical_url(url) == ""


@pytest.fixture(params=["library", "pattern"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled library, where there is one, and the pattern that replaces it."""
    if request.param == "pattern":
        monkeypatch.setattr(texts, "library", lambda: None)


@pytest.mark.usefixtures("engine")
def test_a_column_gets_the_same_spellings_as_single_urls() -> None:
    urls = [url for url, _ in SPELLINGS] + [url for url in REFUSED if "\ud800" not in url] + [None]
    column = canonical_column(pa.array(urls, pa.string()))
    assert column.to_pylist() == [(url and canonical_url(url)) or None for url in urls]


@pytest.mark.usefixtures("engine")
def test_the_fast_checks_accept_only_canonical_urls() -> None:
    characters = [chr(code) for code in range(1, 0x180)]
    urls = [
        shape.format(character)
        for shape in (
            "http://example.org/a{}b",
            "http://e{}.org/",
            "http{}://e.org/",
            "http://e.org:1{}/a",
            "{}http://e.org/",
        )
        for character in characters
    ]
    column = canonical_column(pa.array(urls))
    assert column.to_pylist() == [canonical_url(url) or None for url in urls]


@pytest.mark.usefixtures("engine")
def test_a_column_gets_the_ids_of_single_urls() -> None:
    urls = [f"http://example.org/{n}" for n in range(50)]
    ids, check = hash_urls(pa.array(urls))
    assert ids.tolist() == [image_id(url) for url in urls]
    assert len(set(check.tolist())) == 50
    known, canonical, ids_of_known = url_ids(pa.array(["HTTP://example.org/7", None, "no URL", urls[9]]))
    assert (known.tolist(), canonical.to_pylist()) == ([0, 3], [urls[7], urls[9]])
    assert ids_of_known.tolist() == ids[[7, 9]].tolist()


def test_a_host_is_found_with_and_without_a_port() -> None:
    assert host_name("http://example.org:8080/a:b") == "example.org"
    assert host_name("http://[2001:db8::1]:8080/a") == "2001:db8::1"
