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
            place = error.start
            raise UserError(
                f"the text {text[max(0, place - 30) : place + 30]!r} has {text[place]!r} at character {place + 1}, "
                "a lone surrogate, which is no character. Write this place anew, or encode the text as UTF-8."
            ) from None
