"""The rules of a robots.txt for one crawler (RFC 9309), with Crawl-delay and Content-Usage.

Takes the file's bytes and the names of the crawler; gives the rules of the group that addresses it. Patterns are
matched without regular expressions: a hostile pattern costs no more than its length.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.web.preferences import usage_forbidden

_KEYS = (
    (re.compile(r"user[ _-]?agents?"), "user-agent"),
    (re.compile(r"dis+al+ow"), "disallow"),
    (re.compile(r"allow"), "allow"),
    (re.compile(r"crawl[ _-]?delay"), "crawl-delay"),
    (re.compile(r"content-(usage|signal)"), "usage"),
)
_ESCAPE = re.compile("%([0-9a-fA-F]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


@dataclass(frozen=True)
class RobotsRules:
    """The rules for one crawler. Each is a path pattern and whether it allows, or forbids training."""

    access: tuple[tuple[str, bool], ...] = ()
    usage: tuple[tuple[str, bool], ...] = ()
    crawl_delay_s: float = 0.0

    def __len__(self) -> int:
        return len(self.access) + len(self.usage)

    def disallows(self, path: str) -> bool:
        """Whether the longest pattern that matches a path and query disallows it; of equal lengths `allow` counts."""
        return _longest_match(self.access, path) is False

    def forbids_training(self, path: str) -> bool:
        """Whether the longest pattern that matches a path and query forbids training."""
        return _longest_match(self.usage, path) is True


def parse_robots(body: bytes, names: Sequence[str]) -> RobotsRules:
    """The rules for the first of these names that the file addresses, else for all crawlers. names: lower-case."""
    groups: dict[str, list[tuple[str, str]]] = {}
    current = {"*"}  # rules before the first group are meant for all
    group_began = True
    for key, value in _fields(body):
        if key == "user-agent":
            if group_began:
                current, group_began = set(), False
            token = re.split(r"[\s/]", value.lower())[0]
            if token == "*" or (token and any(name.startswith(token) for name in names)):
                current.add(token)
                groups.setdefault(token, [])
        else:
            group_began = True
            for token in current:
                groups.setdefault(token, []).append((key, value))
    for name in names:
        if matching := [token for token in groups if name.startswith(token)]:
            return _rules(groups[max(matching, key=len)])
    return _rules(groups.get("*", []))


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern with `*` and a final `$` matches the beginning of a path and query.

    >>> matches("/a*.png$", "/a/b.png"), matches("/a*.png$", "/a/b.png?x"), matches("/b", "/a/b")
    (True, False, False)
    """
    is_whole = pattern.endswith("$")
    first, *parts = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not parts:
        return not is_whole or path == first
    position = len(first)
    for part in parts[:-1]:
        position = path.find(part, position) + len(part)
        if position < len(part):
            return False
    if is_whole:
        return len(path) - len(parts[-1]) >= position and path.endswith(parts[-1])
    return path.find(parts[-1], position) >= 0


def normal_path(path: str) -> str:
    """A path or pattern with one spelling for equal characters: percent-encoded only where it must be."""
    encoded = quote(path, safe=_PRINTABLE, errors="surrogateescape")
    return _ESCAPE.sub(_normal_escape, encoded)


def _normal_escape(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if _UNRESERVED.match(character) else escape[0].upper()


def _fields(body: bytes) -> Iterator[tuple[str, str]]:
    """The keys and values that have a meaning here, in the order of the file."""
    is_utf16 = body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = body.decode("utf-16", "replace") if is_utf16 else body.decode("utf-8-sig", "surrogateescape")
    for line in re.split(r"[\r\n]+", text):
        content = line.partition("#")[0]
        name, colon, value = content.partition(":")
        if not colon and len(words := content.split()) == 2:  # as other crawlers read it
            name, value = words
        key = next((key for pattern, key in _KEYS if pattern.fullmatch(name.strip().lower())), "")
        if key:
            yield key, value.strip()


def _rules(fields: Iterable[tuple[str, str]]) -> RobotsRules:
    access, usage, delay_s = [], [], 0.0
    for key, value in fields:
        if key == "crawl-delay":
            number = re.match(r"[0-9]{1,9}(\.[0-9]{1,9})?", value)
            delay_s = max(delay_s, float(number[0]) if number else 0.0)
        elif key == "usage":
            path, *preference = value.split(None, 1) if value.startswith(("/", "*")) else ("/", value)
            usage.append((_pattern(path), usage_forbidden("".join(preference))))
        elif value:
            access.append((_pattern(value), key == "allow"))
    return RobotsRules(tuple(access), tuple(usage), delay_s)


def _pattern(value: str) -> str:
    path = value if value.startswith(("/", "*")) else f"/{value}"
    return normal_path(re.sub(r"\*+", "*", path))


def _longest_match(rules: Iterable[tuple[str, bool]], path: str) -> bool | None:
    """The flag of the longest pattern that matches a path and query, of equally long ones True; None without one."""
    path = normal_path(path)
    return max(((len(pattern), flag) for pattern, flag in rules if matches(pattern, path)), default=(0, None))[1]
