"""What a picture of the demo shows: the data classes that drawing, captions and metadata share."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Content:
    """What a picture shows, independent of its style. layout is "" for a single shape."""

    shape: str
    color: str
    background: str
    count: int
    layout: str


@dataclass(frozen=True)
class Scene:
    """One picture. seed decides position, size, rotation and the jitter of the texture."""

    content: Content
    style: str
    seed: int
