"""Images that must not be used: listed by URL, domain, image id, content or perceptual hash.

Reads a text file in UTF-8, or in UTF-16 with a byte order mark. Empty lines and lines that begin with `#` are skipped.
Each other line is one entry:

- a URL: blocks it for http and https; without a path it is a domain;
- a domain: blocks its subdomains too; `*.` before it changes nothing; a port restricts it to that port;
- an image id: 16 hex digits as in the tars, or a signed decimal;
- `md5:` or `sha256:` and a file's hash in hex;
- `phash:` and the 16 hex digits of a perceptual hash.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.web.urls import canonical_url
from retrieval.errors import UserError
from retrieval.perceptual_hash import Hashes, PerceptualHashIndex
from retrieval.storage.root import Root
from retrieval.storage.schema import image_id

_HEX = re.compile(r"[0-9a-fA-F]{16}")
_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_PORT = re.compile(r":[0-9]+$")
_DIGEST = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
_PHASH = re.compile(r"phash:[0-9a-f]{16}")


@dataclass(frozen=True)
class Blocklist:
    """Entries of a blocklist. ids: sorted."""

    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    domains: frozenset[str] = frozenset()
    """Hosts as in canonical URLs, with or without a port."""
    digests: frozenset[str] = frozenset()
    """`md5:` or `sha256:` and lower-case hex digits."""
    phashes: Hashes = field(default_factory=lambda: np.empty(0, np.int64))
    max_distance: int = 6
    """Largest number of different bits at which a perceptual hash equals a listed one, or its mirror."""
    erased: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Further listed ids, sorted. `identity` is without them, so they cause no update of finished shards."""

    @cached_property
    def identity(self) -> str:
        """Digest of the entries, which comments and their order do not change; "" without entries."""
        names = sorted(self.domains | self.digests)
        if not (names or len(self.ids) or len(self.phashes)):
            return ""
        parts = (*names, str(self.max_distance), np.unique(self.phashes).tobytes().hex())
        return hashlib.sha256("\n".join(parts).encode() + b"\n" + np.unique(self.ids).tobytes()).hexdigest()[:16]

    def blocks_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these image ids are listed."""
        listed = np.zeros(len(ids), bool)
        for entries in (self.ids, self.erased):
            if len(entries):
                positions = np.minimum(np.searchsorted(entries, ids), len(entries) - 1)
                listed |= entries[positions] == ids
        return listed

    def blocks_hosts(self, urls: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which of these canonical URLs belong to a listed domain or to a subdomain of one. Relative paths do not."""
        if not self.domains:
            return np.zeros(len(urls), bool)
        addresses = pc.if_else(pc.match_substring(urls, "://"), urls, ":///")
        hosts = pc.list_element(pc.split_pattern(addresses, "/", max_splits=3), 2).dictionary_encode()
        listed = np.array([self._is_listed(name) for name in hosts.dictionary.to_pylist()], bool)
        return listed[hosts.indices.to_numpy(zero_copy_only=False)]

    def blocks_url(self, url: str) -> bool:
        """Whether a canonical URL or its domain is listed."""
        return bool(self.blocks_ids(np.array([image_id(url)]))[0]) or self._is_listed(url.split("/", 3)[2])

    def blocks_content(self, body: bytes) -> bool:
        """Whether the hash of these bytes is listed."""
        return bool(self.digests) and not self.digests.isdisjoint(
            {f"md5:{hashlib.md5(body).hexdigest()}", f"sha256:{hashlib.sha256(body).hexdigest()}"}
        )

    def blocks_contents(self, sha256: pa.StringArray, checksums: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which files are listed. sha256: hex; checksums: from the metadata, `md5:` or `sha256:` and hex, or null."""
        listed = pa.array(sorted(self.digests), pa.string())
        by_sha256 = pc.is_in(pc.binary_join_element_wise("sha256:", sha256, ""), listed)
        return np.asarray(pc.or_(by_sha256, pc.is_in(checksums, listed)).to_numpy(zero_copy_only=False))

    def blocks_phashes(self, phashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these perceptual hashes are within max_distance of a listed one."""
        if not len(self.phashes):
            return np.zeros(len(phashes), bool)
        return self._hash_index.contains_near(phashes, self.max_distance)

    @cached_property
    def _hash_index(self) -> PerceptualHashIndex:
        return PerceptualHashIndex(self.phashes)

    def _is_listed(self, authority: str) -> bool:
        """Whether a host, with or without a port, or a domain that it belongs to is listed."""
        names = {authority, _PORT.sub("", authority)}
        parents = (name.split(".", position)[-1] for name in names for position in range(name.count(".") + 1))
        return not self.domains.isdisjoint(parents)


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
    return _parse(_lines(content, path), path)


def _lines(content: bytes, path: str) -> list[str]:
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        # A concatenated list has a byte order mark within.
        return re.split(r"\r\n|\r|\n", content.decode(encoding).replace("\ufeff", ""))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {number}: {content[error.start : error.end]!r} is not {encoding.upper()}."
            " Save the list as UTF-8."
        ) from error


def _parse(lines: Iterable[str], path: str) -> Blocklist:
    ids: set[int] = set()
    entries: set[str] = set()
    domains: set[str] = set()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if _DIGEST.fullmatch(entry.lower()) or _PHASH.fullmatch(entry.lower()):
            entries.add(entry.lower())
        elif domain := _domain(entry):
            domains.add(domain)
        elif entry_ids := _ids(entry):
            ids |= entry_ids
        else:
            raise UserError(
                f"{path}, line {number}: {entry[:100]!r} is not a URL, a domain, an image id (16 hex digits"
                " or a decimal number), or md5:, sha256: or phash: with 32, 64 or 16 hex digits."
                " Correct or remove the line."
            )
    phashes = sorted(entry for entry in entries if entry.startswith("phash:"))
    return Blocklist(
        ids=np.array(sorted(ids), np.int64),
        domains=frozenset(domains),
        digests=frozenset(entry for entry in entries if _DIGEST.fullmatch(entry)),
        phashes=np.array([_signed(entry.removeprefix("phash:")) for entry in phashes], np.int64),
    )


def _domain(entry: str) -> str:
    """The host of a domain, or of a URL without a path, with its port if that is not a default one; else ""."""
    scheme, _, rest = entry.rpartition("://")
    name = re.sub(r"^(\*\.|\.)", "", rest)
    authority, _, path = canonical_url(f"{scheme or 'http'}://{name}").partition("://")[2].partition("/")
    is_domain = not path and ("." in authority or authority.startswith("["))
    return re.sub(r":(80|443)$", "", authority) if is_domain else ""


def _ids(entry: str) -> set[int]:
    """The image ids that an entry can mean; empty for a domain or a hash."""
    if address := canonical_url(entry).partition(":")[2]:
        return {image_id(canonical_url(f"{scheme}:{address}")) for scheme in ("http", "https")}
    ids = set()
    if _HEX.fullmatch(entry):
        ids.add(_signed(entry))
    # 16 decimal digits fit both notations: both ids are blocked
    if _DECIMAL.fullmatch(entry) and -(1 << 63) <= int(entry) < 1 << 63:
        ids.add(int(entry))
    return ids


def _signed(digits: str) -> int:
    """The int64 of 16 hex digits."""
    return int(np.uint64(int(digits, 16)).astype(np.int64))
