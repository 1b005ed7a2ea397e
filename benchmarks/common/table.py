"""Markdown tables."""


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table; a head that ends in a colon stands over numbers."""
    lines = [[head.removesuffix(":") for head in heads]]
    lines.append(["---:" if head.endswith(":") else "---" for head in heads])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *rows])
