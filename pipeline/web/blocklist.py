"""Images that must not be used: listed by URL, domain, image id, content or perceptual hash.

Reads a text file, one entry a line: a URL, a domain (its subdomains are meant too), an image id as the 16
hex digits that name it in the tars or as a signed decimal; `md5:` or `sha256:` with the hex digits of a
file's hash, `phash:` with the 16 of a perceptual hash. Empty lines and lines
that begin with `#` are skipped.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.web.urls import canonical, host
from retrieval.errors import UserError
from retrieval.perceptual_hash import Hashes, PerceptualHashIndex
from retrieval.storage.root import Root
from retrieval.storage.schema import image_id

_HEX = re.compile(r"[0-9a-fA-F]{16}")
_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")
_DIGEST = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
_PHASH = re.compile(r"phash:[0-9a-f]{16}")


@dataclass(frozen=True)
class Blocklist:
    """What is blocked. ids: sorted, int64; domains: lower-case; identity: of the list's text, "" for none."""

    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    domains: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    """`md5:` or `sha256:` and lower-case hex digits."""
    phashes: Hashes = field(default_factory=lambda: np.empty(0, np.int64))
    bits: int = 6
    """Bits in which a perceptual hash may differ from a listed one, or its mirror, and is still meant."""
    identity: str = ""

    def blocks_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these image ids are listed."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.asarray(self.ids[place] == ids)

    def blocks_hosts(self, urls: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which of these canonical URLs are of a listed domain or a subdomain of one."""
        if not self.domains:
            return np.zeros(len(urls), bool)
        authorities = pc.list_element(pc.split_pattern(urls, "/", max_splits=3), 2)
        hosts = pc.replace_substring_regex(authorities, ":[0-9]+$", "").dictionary_encode()
        listed = np.array([self._lists(name) for name in hosts.dictionary.to_pylist()], bool)
        return listed[hosts.indices.to_numpy(zero_copy_only=False)]

    def blocks_url(self, url: str) -> bool:
        """Whether one canonical URL is listed, or its domain."""
        return bool(self.blocks_ids(np.array([image_id(url)]))[0]) or self._lists(host(url))

    def blocks_content(self, body: bytes) -> bool:
        """Whether the hash of these bytes is listed."""
        return bool(self.digests) and not self.digests.isdisjoint(
            {f"md5:{hashlib.md5(body).hexdigest()}", f"sha256:{hashlib.sha256(body).hexdigest()}"}
        )

    def blocks_hashes(self, phashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these perceptual hashes are those of listed pictures, or near them."""
        return (
            self._hash_index.contains_near(phashes, self.bits)
            if len(self.phashes)
            else np.zeros(len(phashes), bool)
        )

    @cached_property
    def _hash_index(self) -> PerceptualHashIndex:
        return PerceptualHashIndex(self.phashes)

    def _lists(self, name: str) -> bool:
        labels = name.split(".")
        return any(".".join(labels[i:]) in self.domains for i in range(len(labels)))


def read_blocklist(path: str, setting: str = "filter.blocklist") -> Blocklist:
    """The blocklist at a path or URL; an empty one for "". Raises UserError for a line it cannot read.

    setting: what named the path, for the error.
    """
    if not path:
        return Blocklist()
    folder, _, name = path.rpartition("/")
    root = Root(folder or ("/" if path.startswith("/") else "."))
    if not root.exists(name):
        raise UserError(f"{path} is missing: the blocklist that {setting} names. Mend it.")
    with root.open(name) as file:
        content = file.read()
    return _parse(
        content.decode(errors="replace").splitlines(), path, hashlib.sha256(content).hexdigest()[:16]
    )


def _parse(lines: Iterable[str], path: str, identity: str) -> Blocklist:
    ids: set[int] = set()
    words: set[str] = set()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        # sixteen decimal digits can be either notation: both ids are blocked
        found = _ids(entry)
        ids |= found
        if not found and not any(kind.fullmatch(entry.lower()) for kind in (_DIGEST, _PHASH, _DOMAIN)):
            raise UserError(
                f"{path}, line {number}: {entry[:100]!r} is no URL, no domain, no image id (16 hex digits, or"
                " a decimal number) and no md5:, sha256: or phash: with 32, 64 or 16 hex digits."
                " Mend or remove the line."
            )
        if not found:
            words.add(entry.lower())
    hashes = sorted(word for word in words if word.startswith("phash:"))
    return Blocklist(
        ids=np.array(sorted(ids), np.int64),
        domains=frozenset(word for word in words if ":" not in word),
        digests=frozenset(word for word in words if _DIGEST.fullmatch(word)),
        phashes=np.array([_signed(word.removeprefix("phash:")) for word in hashes], np.int64),
        identity=identity,
    )


def _ids(entry: str) -> set[int]:
    url = canonical(entry)
    if url:
        return {image_id(url)}
    found = set()
    if _HEX.fullmatch(entry):
        found.add(_signed(entry))
    if _DECIMAL.fullmatch(entry) and -(1 << 63) <= int(entry) < 1 << 63:
        found.add(int(entry))
    return found


def _signed(digits: str) -> int:
    """The int64 of 16 hex digits."""
    return int(np.uint64(int(digits, 16)).astype(np.int64))
