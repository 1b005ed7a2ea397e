"""Where a benchmark's numbers and its page go."""

import json
import os
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRATCH = REPOSITORY / "runs" / "bench"
DOCS = REPOSITORY / "docs"


def write(folder: Path, name: str, result: dict[str, Any], page: str) -> None:
    """Write `<name>.json` and `<name>.md` whole, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", page)):
        path = folder / f"{name}{suffix}"
        pending = path.with_suffix(".partial")
        pending.write_text(text)
        os.replace(pending, path)
    print(page)
    print(f"written: {folder / name}.md")


def threads(count: int) -> str:
    """So many threads, in words."""
    return f"{count} thread{'s' if count > 1 else ''}"
