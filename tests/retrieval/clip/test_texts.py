"""Texts that CLIP cannot read."""

from pathlib import Path

import pytest

from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from tests.retrieval.tiny_clip import write_clip


def test_a_text_with_a_lone_surrogate_is_refused_with_its_place(tmp_path: Path):
    encoder = Encoder(write_clip(tmp_path / "clip", seed=0))
    for read in (encoder.encode_texts, encoder.truncated, encoder.truncation_note):
        with pytest.raises(UserError, match=r"'a s\\udce9a' has '\\udce9' at character 4.*encode the text as UTF-8"):
            read(["a stag", "a s\udce9a"])
