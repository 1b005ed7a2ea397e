"""Preferences against machine learning that servers state with a picture or for a whole site.

Reads values of response headers, rules of robots.txt and /.well-known/tdmrep.json; tells whether they forbid this use.
Where statements differ, the most restrictive one counts.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag."""
EARLIER_AGENT = "img2dataset"
"""Pictures of LAION were fetched under this name before. Preferences for it apply to us too."""

# Directives of X-Robots-Tag with a value after a colon; any other word before a colon names a crawler.
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
# Not the start of a date, such as `2010-06-25t15` or `15`.
_CRAWLER = re.compile(r"(?![\d-]+(t\d+)?$)[^\s=]+")
# Keys of Content-Usage (IETF AIPREF, with the names of earlier drafts) and of Content-Signal.
_TRAINING = frozenset({"train-ai", "train-genai", "genai", "ai-train", "ai-input"})
_INCLUDES_TRAINING = frozenset({"all", "bots", "tdm", "ai", "ai-use"})
_MEMBER = re.compile(r"(?<![a-z0-9_.-])([a-z][a-z0-9_.-]*)\s*=\s*[\"']?(\??\w+)")
_NO, _YES = frozenset({"n", "no", "?0"}), frozenset({"y", "yes", "?1"})
_RESERVED = re.compile(rb"tdm-reservation[\"']?\s*:\s*[\"']?1")


def opted_out(values: Iterable[str], user_agent: str) -> bool:
    """True if X-Robots-Tag headers forbid this use to all crawlers, or to ours by name.

    A date of `unavailable_after` in the past counts as `noindex`.

    >>> opted_out(["googlebot: noindex", "nofollow, NoAI"], "laion-rdm")
    True
    >>> opted_out(["googlebot: noindex, noai"], "laion-rdm")
    False
    """
    crawlers = {"", "*", user_agent.lower(), EARLIER_AGENT}
    return any(
        crawler in crawlers and directive in OPT_OUT for value in values for crawler, directive in _directives(value)
    )


def _directives(value: str) -> Iterator[tuple[str, str]]:
    """The directives of an X-Robots-Tag header in lower case, each with its crawler, "" for all."""
    crawler = ""
    parts = re.split("[,;]", value.lower())
    for position, part in enumerate(parts):
        words = [word.strip(" \t\"'[]{}") for word in part.split(":")]
        if len(words) > 1 and _CRAWLER.fullmatch(words[0]) and words[0] not in _WITH_VALUE | OPT_OUT:
            crawler = words.pop(0).partition("/")[0]
        if words[0] == "unavailable_after":
            date = part.partition("unavailable_after")[2].lstrip(" :")
            if _is_past(date) or _is_past(",".join([date, *parts[position + 1 : position + 2]])):
                yield crawler, "noindex"
        elif words[0] not in _WITH_VALUE:
            yield from ((crawler, directive) for word in words for directive in word.split())


def _is_past(text: str) -> bool:
    """Whether a text is a date (RFC 822, RFC 850 or ISO 8601) in the past."""
    for read in (datetime.fromisoformat, parsedate_to_datetime, lambda day: parsedate_to_datetime(f"{day} 00:00:00")):
        try:
            date = read(text.strip().upper())
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() < time.time()
        except (ValueError, OverflowError):
            continue
    return False


def usage_forbidden(text: str) -> bool:
    """True if a value of Content-Usage or Content-Signal forbids training.

    >>> [usage_forbidden(text) for text in ("train-ai=n", "search=y, ai-train=no", "bots=n, train-ai=y")]
    [True, True, False]
    """
    members = _MEMBER.findall(text.lower())
    forbidden = {key for key, value in members if value in _NO}
    if forbidden & _TRAINING:
        return True
    # The narrower preference counts: a server may forbid all uses but training.
    return bool(forbidden & _INCLUDES_TRAINING) and not any(
        key in _TRAINING and value in _YES for key, value in members
    )


def tdm_reserved(values: Iterable[str]) -> bool:
    """True if a TDM-Reservation header (TDMRep) reserves text and data mining."""
    return any(word.strip(" \t\"'") == "1" for value in values for word in value.split(","))


def reserved_locations(body: bytes) -> tuple[str, ...]:
    """The path patterns of a tdmrep.json that reserve text and data mining."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        # Many servers answer with an HTML page. A damaged file that reserves anything reserves all.
        return ("/",) if _RESERVED.search(body) else ()
    rules = content if isinstance(content, list) else [content]
    reserved = (rule for rule in rules if isinstance(rule, dict) and str(rule.get("tdm-reservation")) in ("1", "True"))
    return tuple(str(rule.get("location", "/")) for rule in reserved)
