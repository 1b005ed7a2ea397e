"""Unusual rows of the demo: the defects that metadata of a web crawl contains.

Each kind changes one thing of an ordinary row; its name goes into truth.parquet. `failure:<route>` never returns a
usable picture; `route:<route>` returns one, indirectly or in an unusual format (routes: jobs.demo.server.routes).
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jobs.demo.world.metadata import Row, Site, ordinary_row

CHANGE_STREAM = 2

Change = Callable[[Row, np.random.Generator], Row]


@dataclass(frozen=True)
class Kind:
    """One kind of unusual row."""

    name: str
    per_mille: int
    """Rows for each thousand ordinary rows, at least one."""
    change: Change
    large_every: int = 0
    """Every n-th row has, or states, the size of a training picture; 0: none."""
    picture: bool = True
    """Whether the URL has a picture."""
    file_format: str = ""


def _with(**changes: object) -> Change:
    return lambda row, rng: replace(row, **changes)  # type: ignore[arg-type]


def _with_url(edit: Callable[[str], str | None]) -> Change:
    return lambda row, rng: replace(row, url=edit(row.url or ""))


def _via(route: str) -> Change:
    return _with_url(lambda url: url.replace("/images/", f"/{route}/"))


def _any_url(*templates: str) -> Change:
    """One of the templates, with a number in `{}` so that all rows differ."""
    return lambda row, rng: replace(row, url=str(rng.choice(templates)).replace("{}", str(row.scene_uid)))


def _renamed(word: str, row: Row, rng: np.random.Generator) -> Row:
    """Prefix the picture's file name and the last part of the URL with word, unquoted."""
    assert row.file is not None
    assert row.url is not None
    renamed = replace(row.file, path=row.file.path.replace("images/", f"images/{word}"))
    return replace(row, url=row.url.replace("/images/", f"/images/{word}"), file=renamed)


def _with_score(name: str, least: float) -> Change:
    """A random score from least to 1."""
    return lambda row, rng: replace(row, **{name: float(rng.uniform(least, 1))})  # type: ignore[arg-type]


def _states_large(row: Row, rng: np.random.Generator) -> Row:
    return replace(row, width=int(rng.integers(768, 2049)), height=int(rng.integers(768, 2049)))


def _turned_size(row: Row, rng: np.random.Generator) -> Row:
    return replace(_via("exif")(row, rng), width=row.height, height=row.width)


def _data_url(row: Row, rng: np.random.Generator) -> Row:
    body = base64.b64encode(f"GIF89a{row.scene_uid}".encode()).decode()
    return replace(row, url=f"data:image/gif;base64,{body}")


def _long_caption(row: Row, rng: np.random.Generator) -> Row:
    text = f"{row.caption}. "
    return replace(row, caption=(text * (10_240 // len(text) + 1))[:10_240])


def _html_caption(row: Row, rng: np.random.Generator) -> Row:
    link = f'<a href="/buy?a=1&amp;b=2"><b>{row.caption}</b></a>'
    return replace(row, caption=f'{link}<script>alert("{row.scene_uid}")</script>')


def _caption_around(template: str) -> Change:
    return lambda row, rng: replace(row, caption=template.replace("{}", row.caption or ""))


NAN = float("nan")
PRIVATE_HOSTS = (
    "http://169.254.169.254/latest/meta-data/{}",
    "http://10.0.0.1/{}.jpg",
    "http://192.168.1.1/{}.jpg",
    "http://[::ffff:10.0.0.1]/{}.jpg",
    "http://0x0a000001/{}.jpg",
)
MALFORMED_URLS = (
    "http:///images/{}.jpg",
    "http://[::1/{}.jpg",
    "http://127.0.0.1:99999/images/{}.jpg",
    "www.example.com/{}.jpg",
    "picture number {}",
)

SCORE_KINDS = (
    Kind("score_null", 12, _with(punsafe=None, pwatermark=None), large_every=4),
    Kind("score_nan", 4, _with(punsafe=NAN, pwatermark=NAN), large_every=4),
    Kind("similarity_null", 2, _with(similarity=None)),
    Kind("watermark", 14, _with_score("pwatermark", 0.85), large_every=4),
    Kind("unsafe", 14, _with_score("punsafe", 0.55), large_every=4, picture=False),
)
SIZE_KINDS = (
    Kind("lies", 10, _states_large),
    Kind("size_null", 2, _with(width=None, height=None)),
    Kind("size_zero", 2, _with(width=0, height=0)),
    Kind("size_negative", 2, _with(width=-1, height=-1)),
)
CAPTION_KINDS = (
    Kind("caption_null", 3, _with(caption=None), large_every=3),
    Kind("caption_empty", 3, _with(caption=""), large_every=3),
    Kind("caption_long", 2, _long_caption, large_every=3),
    Kind("caption_emoji", 3, _caption_around("😀🏳️‍🌈 {} 👩‍🚀"), large_every=3),
    Kind("caption_rtl", 2, _caption_around("\u202eصورة: {} תמונה\u202c"), large_every=3),
    Kind("caption_nul", 2, _caption_around("\0{}\0\x07"), large_every=3),
    Kind("caption_html", 3, _html_caption, large_every=3),
)
URL_KINDS = (
    Kind("url_null", 3, _with(url=None), picture=False),
    Kind("url_empty", 2, _with(url=""), picture=False),
    Kind("url_file", 3, _any_url("file:///etc/hostname#{}", "file:///etc/services#{}"), picture=False),
    Kind("url_data", 2, _data_url, picture=False),
    Kind("url_ftp", 2, _with_url(lambda url: url.replace("http:", "ftp:")), picture=False),
    Kind("url_malformed", 2, _any_url(*MALFORMED_URLS), picture=False),
    Kind("url_private", 2, _any_url(*PRIVATE_HOSTS), picture=False),
    Kind("url_control", 2, _with_url(lambda url: url.replace("images/", "\r\nX-Evil: 1")), picture=False),
    Kind("url_credentials", 2, _with_url(lambda url: url.replace("//", "//user:secret@"))),
    Kind("url_space", 3, partial(_renamed, "two words ")),
    Kind("url_iri", 4, partial(_renamed, "straße-été-絵-")),
)
FAILURE_KINDS = (
    Kind("failure:missing", 10, _via("missing"), large_every=2, picture=False),
    Kind("failure:forbidden", 2, _via("forbidden"), large_every=2, picture=False),
    Kind("failure:gone", 2, _via("gone"), large_every=2, picture=False),
    Kind("failure:refused", 2, _any_url("http://127.0.0.1:1/images/{}.jpg"), large_every=2, picture=False),
    Kind("failure:redirect-loop", 1, _via("redirect-loop"), picture=False),
    Kind("failure:redirect-private", 1, _via("redirect-private"), picture=False),
    # few: each of these holds a connection until the client times out
    Kind("failure:drip", 1, _via("drip"), large_every=2, picture=False),
    Kind("failure:html", 3, _via("html"), large_every=2, picture=False),
    Kind("failure:empty", 2, _via("empty"), picture=False),
    Kind("failure:huge", 1, _via("huge"), large_every=2, picture=False),
    Kind("failure:endless", 1, _via("endless"), large_every=2, picture=False),
    Kind("failure:truncated", 2, _via("truncated"), large_every=4, file_format="jpg"),
    Kind("failure:cut-jpeg", 2, _via("cut-jpeg"), large_every=4, file_format="jpg"),
    Kind("failure:noai", 3, _via("noai"), large_every=4),
)
ROUTE_KINDS = (
    Kind("route:flaky", 4, _via("flaky"), large_every=4),
    Kind("route:redirect", 4, lambda row, rng: _via(f"redirect/{rng.integers(1, 5)}")(row, rng), large_every=4),
    Kind("route:slow", 2, _via("slow"), large_every=4),
    Kind("route:exif", 3, _turned_size, large_every=4, file_format="exif"),
    *(
        Kind(f"route:{name}", 3, _via(name), large_every=4, file_format=name)
        for name in ("png16", "gray", "alpha", "palette", "animated")
    ),
)
KINDS = (*SCORE_KINDS, *SIZE_KINDS, *CAPTION_KINDS, *URL_KINDS, *FAILURE_KINDS, *ROUTE_KINDS)


def bad_rows(site: Site, first_uid: int, num_ordinary: int) -> list[Row]:
    """Rows of every kind in KINDS. Their scene_uid starts at first_uid."""
    rows: list[Row] = []
    for kind in KINDS:
        for i in range(num_rows(kind.per_mille, num_ordinary)):
            large = kind.large_every > 0 and (i + 1) % kind.large_every == 0
            rows.append(_bad_row(site, first_uid + len(rows), kind, large))
    return rows


def num_rows(per_mille: int, num_ordinary: int) -> int:
    """Number of rows for a share of the ordinary rows, at least one."""
    return max(1, round(per_mille * num_ordinary / 1000))


def _bad_row(site: Site, uid: int, kind: Kind, large: bool) -> Row:
    row = ordinary_row(site, uid, large, kind.file_format)
    row = replace(kind.change(row, np.random.default_rng([site.seed, CHANGE_STREAM, uid])), kind=kind.name)
    if kind.picture:
        return row
    return replace(row, scene_uid=None, scene=None, size=None, file=None)
