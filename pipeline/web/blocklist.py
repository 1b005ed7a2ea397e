"""Images that must not be used: listed by URL, domain, image id, content or perceptual hash.

Reads a text file with one entry a line: a URL, a domain (blocks its subdomains too), an image id (16 hex
digits as in the tars, or a signed decimal), `md5:` or `sha256:` with a file's hash in hex, or `phash:` with
the 16 hex digits of a perceptual hash. Empty lines and lines that begin with `#` are skipped.
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

from pipeline.web.urls import canonical_url, host_name
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
    """Entries of a blocklist. ids: sorted; domains: lower-case; identity: hash of the file, "" if none."""

    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    domains: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    """`md5:` or `sha256:` and lower-case hex digits."""
    phashes: Hashes = field(default_factory=lambda: np.empty(0, np.int64))
    max_distance: int = 6
    """Largest number of different bits at which a perceptual hash equals a listed one, or its mirror."""
    identity: str = ""

    def blocks_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these image ids are listed."""
        if not len(self.ids):
            return np.zeros(len(ids), bool)
        positions = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.asarray(self.ids[positions] == ids)

    def blocks_hosts(self, urls: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which of these canonical URLs belong to a listed domain or to a subdomain of one."""
        if not self.domains:
            return np.zeros(len(urls), bool)
        authorities = pc.list_element(pc.split_pattern(urls, "/", max_splits=3), 2)
        hosts = pc.replace_substring_regex(authorities, ":[0-9]+$", "").dictionary_encode()
        listed = np.array([self._is_listed(name) for name in hosts.dictionary.to_pylist()], bool)
        return listed[hosts.indices.to_numpy(zero_copy_only=False)]

    def blocks_url(self, url: str) -> bool:
        """Whether a canonical URL or its domain is listed."""
        return bool(self.blocks_ids(np.array([image_id(url)]))[0]) or self._is_listed(host_name(url))

    def blocks_content(self, body: bytes) -> bool:
        """Whether the hash of these bytes is listed."""
        return bool(self.digests) and not self.digests.isdisjoint(
            {f"md5:{hashlib.md5(body).hexdigest()}", f"sha256:{hashlib.sha256(body).hexdigest()}"}
        )

    def blocks_phashes(self, phashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these perceptual hashes are within max_distance of a listed one."""
        if not len(self.phashes):
            return np.zeros(len(phashes), bool)
        return self._hash_index.contains_near(phashes, self.max_distance)

    @cached_property
    def _hash_index(self) -> PerceptualHashIndex:
        return PerceptualHashIndex(self.phashes)

    def _is_listed(self, host: str) -> bool:
        labels = host.split(".")
        return any(".".join(labels[i:]) in self.domains for i in range(len(labels)))


def read_blocklist(path: str, setting: str = "filter.blocklist") -> Blocklist:
    """Read the blocklist at a path or URL; an empty one for "". Raises UserError for an invalid line.

    setting: name of the setting that holds the path, for error messages.
    """
    if not path:
        return Blocklist()
    folder, _, name = path.rpartition("/")
    root = Root(folder or ("/" if path.startswith("/") else "."))
    if not root.exists(name):
        raise UserError(f"{path} is missing: it is the blocklist of {setting}. Correct the setting.")
    with root.open(name) as file:
        content = file.read()
    return _parse(content.decode(errors="replace").splitlines(), path, hashlib.sha256(content).hexdigest()[:16])


def _parse(lines: Iterable[str], path: str, identity: str) -> Blocklist:
    ids: set[int] = set()
    entries: set[str] = set()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        # 16 decimal digits fit both notations: both ids are blocked
        if entry_ids := _ids(entry):
            ids |= entry_ids
            continue
        if not any(pattern.fullmatch(entry.lower()) for pattern in (_DIGEST, _PHASH, _DOMAIN)):
            raise UserError(
                f"{path}, line {number}: {entry[:100]!r} is not a URL, a domain, an image id (16 hex digits"
                " or a decimal number), or md5:, sha256: or phash: with 32, 64 or 16 hex digits."
                " Correct or remove the line."
            )
        entries.add(entry.lower())
    phashes = sorted(entry for entry in entries if entry.startswith("phash:"))
    return Blocklist(
        ids=np.array(sorted(ids), np.int64),
        domains=frozenset(entry for entry in entries if ":" not in entry),
        digests=frozenset(entry for entry in entries if _DIGEST.fullmatch(entry)),
        phashes=np.array([_signed(entry.removeprefix("phash:")) for entry in phashes], np.int64),
        identity=identity,
    )


def _ids(entry: str) -> set[int]:
    """The image ids that an entry can mean; empty for a domain or a hash."""
    if url := canonical_url(entry):
        return {image_id(url)}
    ids = set()
    if _HEX.fullmatch(entry):
        ids.add(_signed(entry))
    if _DECIMAL.fullmatch(entry) and -(1 << 63) <= int(entry) < 1 << 63:
        ids.add(int(entry))
    return ids


def _signed(digits: str) -> int:
    """The int64 of 16 hex digits."""
    return int(np.uint64(int(digits, 16)).astype(np.int64))
