"""CLIP: encodes texts and pictures as vectors, and identifies the encoder of stored vectors.

`Encoder` needs the extra `clip` (torch, open_clip); it is imported on first use.
"""

from typing import TYPE_CHECKING

from retrieval.clip.identity import EncoderIdentity
from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.clip.encoder import Encoder

__getattr__ = public_names(__name__, {"encoder": "Encoder"})
