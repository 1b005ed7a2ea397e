"""The table that `laion-rdm status` prints: one line for each stage with a bar, and notes below it.

A terminal that is too narrow for all columns gets the numbers of a stage below its bar.
"""

import textwrap
from collections.abc import Sequence

from pipeline.runtime.status import Status, format_duration

WIDTH = 110
"""Columns of the table where the output is no terminal."""
MIN_BAR, MAX_BAR = 8, 30
MAX_REASONS = 5
"""Reasons that a note lists, most frequent first."""
HEADINGS = ("done", "rows", "rows/s", "on disk", "left")
COLUMNS = (23, 16, 12, 11, 12)
"""Widths of the columns of HEADINGS."""
INDENT = 15
"""Columns before the bar: a mark, the stage's name and gaps."""
MARKS = {"finished": ("✓", "32"), "unfinished": ("▸", "36"), "stale": ("!", "33"), "not started": ("·", "2")}
"""Mark and ANSI color of a state: green, cyan, yellow, faint."""
FAINT, BOLD = "2", "1"


def table(stages: Sequence[Status], width: int = WIDTH, color: bool = False) -> str:
    """The progress of stages as a table. width: of the terminal, in columns; color: with ANSI escape sequences."""
    bar_width = min(MAX_BAR, width - INDENT - len(" 100%") - sum(COLUMNS))
    is_wide = bar_width >= MIN_BAR
    lines = [_painted(f"{'':{INDENT + bar_width + 5}}{_aligned(HEADINGS)}", FAINT, color)] if is_wide else []
    for status in stages:
        numbers = _numbers(status)
        bar = _bar(status, bar_width if is_wide else max(MIN_BAR, min(MAX_BAR, width - INDENT - 5)), color)
        mark, code = MARKS[status.state]
        stage = f"{_painted(mark, code, color)} {_painted(f'{status.stage:<{INDENT - 3}}', BOLD, color)} "
        lines.append(f"{stage}{bar}{_aligned(numbers) if is_wide else ''}".rstrip())
        notes = [*([] if is_wide else [_sentence(numbers)]), _state(status), _reasons(status)]
        indent = " " * (INDENT if is_wide else 2)
        for note in filter(None, notes):
            wrapped = textwrap.wrap(note, width, initial_indent=indent, subsequent_indent=f"{indent}  ")
            lines += [_painted(line, FAINT, color) for line in wrapped]
    return "\n".join(lines)


def _painted(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text


def _aligned(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS, strict=True))


def _sentence(numbers: Sequence[str]) -> str:
    """The numbers of a stage in one line, for narrow terminals."""
    done, rows, rate, size, left = numbers
    named = (done, rows and f"{rows} rows", rate and f"{rate} rows/s", size, left and f"{left} left")
    return ", ".join(filter(None, named))


def _bar(status: Status, width: int, color: bool) -> str:
    """The share of a stage that is done, as a bar of this width and in percent; only 100 % if all is done."""
    share = min(1.0, status.done / status.total) if status.total else 0.0
    full = int(share * width)
    bar = _painted("━" * full, MARKS[status.state][1], color) + _painted("─" * (width - full), FAINT, color)
    return f"{bar}{f'{int(100 * share)}%' if status.total else '':>5}"


def _numbers(status: Status) -> list[str]:
    """The cells of HEADINGS."""
    about = "~" if status.is_estimate else ""
    return [
        _done(status),
        f"{about}{status.rows:,}" if status.rows else "",
        f"{status.rows_per_s:,.{0 if status.rows_per_s >= 100 else 1}f}" if status.rows_per_s else "",
        f"{about}{_size(status.bytes)}" if status.bytes else "",
        format_duration(status.eta_s) if status.eta_s is not None else "",
    ]


def _done(status: Status) -> str:
    if status.state == "not started":
        return ""
    total = "?" if status.total is None else f"{status.total:,}"
    return f"{status.done:,}/{total} {status.unit}"


def _state(status: Status) -> str:
    """The state, phase and note of a stage that is not finished; the note of one that is."""
    state = "" if status.state == "finished" else ", ".join(filter(None, (status.state, status.phase)))
    return ": ".join(filter(None, (state, status.note)))


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
