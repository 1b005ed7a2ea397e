"""Images that must not be used: listed by URL, by domain or by image id.

Reads a text file, one entry a line: a URL, a domain (its subdomains are meant too), or an image id as
the 16 hex digits that name it in the tars or as a signed decimal. Empty lines and lines that begin with
`#` are skipped.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.urls import canonical
from retrieval.errors import UserError
from retrieval.schema import image_id
from retrieval.storage import Root

_HEX = re.compile(r"[0-9a-fA-F]{16}")
_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")


@dataclass(frozen=True)
class Blocklist:
    """What is blocked. ids: sorted, int64; domains: lower-case; identity: of the list's text, "" for none."""

    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    domains: frozenset[str] = frozenset()
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
        listed = np.array([self._lists(host) for host in hosts.dictionary.to_pylist()], bool)
        return listed[hosts.indices.to_numpy(zero_copy_only=False)]

    def _lists(self, host: str) -> bool:
        labels = host.split(".")
        return any(".".join(labels[i:]) in self.domains for i in range(len(labels)))


def read_blocklist(path: str) -> Blocklist:
    """The blocklist at a path or URL; an empty one for "". Raises UserError for a line it cannot read."""
    if not path:
        return Blocklist()
    folder, _, name = path.rpartition("/")
    root = Root(folder or ".")
    if not root.exists(name):
        raise UserError(f"{path} is missing: the blocklist that the recipe names. Mend filter.blocklist.")
    with root.open(name) as file:
        content = file.read()
    ids, domains = _parse(content.decode(errors="replace").splitlines(), path)
    return Blocklist(
        np.unique(np.array(sorted(ids), np.int64)),
        frozenset(domains),
        hashlib.sha256(content).hexdigest()[:16],
    )


def _parse(lines: Iterable[str], path: str) -> tuple[set[int], set[str]]:
    ids: set[int] = set()
    domains: set[str] = set()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        # sixteen decimal digits can be either notation: both ids are blocked
        found = _ids(entry)
        ids |= found
        if not found and _DOMAIN.fullmatch(entry.lower()):
            domains.add(entry.lower())
        elif not found:
            raise UserError(
                f"{path}, line {number}: {entry[:100]!r} is no URL, no domain and no image id"
                " (16 hex digits, or a decimal number). Mend or remove the line."
            )
    return ids, domains


def _ids(entry: str) -> set[int]:
    url = canonical(entry)
    if url:
        return {image_id(url)}
    found = set()
    if _HEX.fullmatch(entry):
        found.add(int(np.uint64(int(entry, 16)).astype(np.int64)))
    if _DECIMAL.fullmatch(entry) and -(1 << 63) <= int(entry) < 1 << 63:
        found.add(int(entry))
    return found
