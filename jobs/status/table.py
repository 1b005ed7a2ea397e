"""The table that `laion-rdm status` prints: one line for each stage, and notes below it."""

import textwrap
from collections.abc import Sequence

from pipeline.runtime.status import Status, format_duration

WIDTH = 110
"""Most columns of the table."""
MAX_REASONS = 5
"""Reasons that a note lists, most frequent first."""
HEADINGS = ("stage", "state", "done", "rows", "rows/s", "on disk", "left")


def table(stages: Sequence[Status]) -> str:
    """The progress of stages as a table."""
    lines = [_line(HEADINGS)]
    for status in stages:
        lines.append(_line(_cells(status)))
        for note in (status.note, _reasons(status)):
            lines += textwrap.wrap(note, WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 15)
    return "\n".join(lines)


def _cells(status: Status) -> list[str]:
    about = "~" if status.is_estimate else ""
    return [
        status.stage,
        status.state,
        _done(status),
        f"{about}{status.rows:,}" if status.rows else "",
        f"{status.rows_per_s:,.1f}" if status.rows_per_s else "",
        f"{about}{_size(status.bytes)}" if status.bytes else "",
        format_duration(status.eta_s) if status.eta_s is not None else "",
    ]


def _line(cells: Sequence[str]) -> str:
    stage, state, done, *numbers = cells
    widths = (16, 14, 11, 14)
    right = "".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths, strict=True))
    return f"{stage:<13}{state:<13}{done:<28}{right}".rstrip()


def _done(status: Status) -> str:
    if status.state == "not started":
        return ""
    total = "?" if status.total is None else f"{status.total:,}"
    return f"{status.phase or status.unit} {status.done:,}/{total}"


def _reasons(status: Status) -> str:
    """The most frequent reasons, and the share of rows that were not kept."""
    if not status.reasons:
        return ""
    lost = sum(status.reasons.values())
    words = [f"{word} {count:,}" for word, count in list(status.reasons.items())[:MAX_REASONS]]
    others = len(status.reasons) - len(words)
    words += [f"{others} more reasons"] if others > 0 else []
    return f"not kept {lost:,} ({lost / (status.rows + lost):.1%}): {', '.join(words)}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
