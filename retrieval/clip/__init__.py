"""CLIP: encodes texts and pictures as vectors. `Encoder` needs the extra `clip` and is imported on first use."""

from typing import TYPE_CHECKING

from retrieval.clip.identity import EncoderIdentity
from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.clip.encoder import Encoder

__getattr__ = public_names(__name__)
