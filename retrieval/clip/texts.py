"""Texts that CLIP can read. Loads no torch."""

from collections.abc import Iterable

from retrieval.errors import UserError


def require_unicode(texts: Iterable[str]) -> None:
    """Raise UserError for a text with a lone surrogate: half of a character, which no tokenizer reads.

    Such texts come from broken JSON escapes, and from command lines in another encoding than UTF-8.

    >>> require_unicode(["a stag 🦌"])
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            start = max(0, error.start - 30)
            raise UserError(
                f"the text {text[start : error.start + 30]!r} has {text[error.start]!r} at character {error.start + 1},"
                " a lone surrogate, which is no character. Write this place anew, or encode the text as UTF-8."
            ) from None
