"""Warns of prompts of which CLIP reads only the start, once for each text."""

import logging
from collections.abc import Sequence

from retrieval.clip.encoder import Encoder
from trainer.sampling.request import Request

log = logging.getLogger("sample")

MAX_TEXTS = 10_000
"""Texts that are remembered: a server reads new ones without end."""


class TruncationWarnings:
    """Texts that were checked. A stage plans the same prompts for each of its groups."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._checked: set[str] = set()

    def warn(self, requests: Sequence[Request]) -> None:
        """Log a warning if CLIP does not read all of the texts of requests that were not checked before."""
        texts = dict.fromkeys(text for each in requests for text in (each.prompt, each.negative_prompt) if text)
        new = [text for text in texts if text not in self._checked]
        if note := self._encoder.truncation_note(new):
            log.warning(note)
        if len(self._checked) + len(new) > MAX_TEXTS:
            self._checked.clear()
        self._checked.update(new)
