"""Tables in Markdown, for pages, guides and README."""

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Columns are aligned to the right if their heading ends in a colon."""
    lines = [[heading.removesuffix(":") for heading in headings]]
    lines.append(["---:" if heading.endswith(":") else "---" for heading in headings])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *rows])
