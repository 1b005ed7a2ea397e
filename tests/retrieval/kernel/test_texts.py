"""Hashes and clean URLs by the compiled library, and without it."""

import ctypes
import hashlib

import numpy as np
import pyarrow as pa
import pytest

from retrieval.kernel import texts
from retrieval.kernel.texts import find_clean_urls, sha256_digests


def expected(values: list[bytes]) -> list[bytes]:
    return [hashlib.sha256(value).digest() for value in values]


@pytest.fixture(params=["library", "hashlib"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "library":
        request.getfixturevalue("compiled_library")
    else:
        monkeypatch.setattr(texts, "library", lambda: None)


@pytest.mark.usefixtures("engine")
def test_texts_of_every_length_have_the_digests_of_hashlib() -> None:
    values = [np.random.default_rng(length).bytes(length) for length in range(300)]
    np.random.default_rng(0).shuffle(values)  # so that texts of different lengths are hashed together
    for part in (values, values[:7], values[:1], []):
        digests = sha256_digests(pa.array(part, pa.binary()))
        assert (digests.shape, digests.dtype) == ((len(part), 32), np.uint8)
        assert [row.tobytes() for row in digests] == expected(part)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_a_slice_of_any_type_of_texts_has_the_digests_of_its_rows(kind: pa.DataType) -> None:
    values = [f"http://example.org/{'ä' * number}" for number in range(60)]
    sliced = pa.array(values).cast(kind)[11:48]
    assert [row.tobytes() for row in sha256_digests(sliced)] == expected([value.encode() for value in values[11:48]])
    assert [row.tobytes() for row in sha256_digests(pa.array([""], kind))] == expected([b""])


def test_clean_urls_have_a_known_scheme_a_plain_host_and_a_printable_path(compiled_library: ctypes.CDLL) -> None:
    clean = ["http://a/", "https://a-b.example.org/%20?q=(1)&r=[2]~", "http://_a.-b.c/", f"http://{'a' * 63}.b/"]
    others = ["", "http", "http:/", "http://", "http:///", "http://a", "https://-a/", "http://a./", "http://a..b/"]
    others += ["HTTP://a/", "httpx://a/", "ftp://a/b/", "http://A/", "http://a:80/", "http://a/ ", "http://a/ä"]
    others += ["http://a/#b", "http://ä/", f"http://{'a' * 64}.b/", "http://u@a/", "http://a/" + "b" * 92]
    urls = pa.array(["cut off", *clean, None, *others, *clean])[1:]
    found = find_clean_urls(urls, max_bytes=100)
    assert found is not None
    assert found.tolist() == [True] * len(clean) + [False] * (1 + len(others)) + [True] * len(clean)
    empty = find_clean_urls(urls[:0], max_bytes=100)
    assert empty is not None
    assert empty.tolist() == []


def test_without_the_library_clean_urls_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "library", lambda: None)
    assert find_clean_urls(pa.array(["http://a/"]), max_bytes=100) is None
