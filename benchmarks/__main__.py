"""`make bench`: measures on this machine and writes `docs/performance.json`, with the machine's name."""

import json
import os
from pathlib import Path

from benchmarks.retrieval import CLUSTERS, DIM, QUERIES, ROUNDS, ROWS, K, measure
from jobs.demo.report import hardware

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "performance.json"


def main() -> None:
    """Measure, print, write."""
    rates = {name: round(value, 3) for name, value in measure().items()}
    setting = {"rows": ROWS, "dim": DIM, "queries": QUERIES, "k": K, "clusters": CLUSTERS, "rounds": ROUNDS}
    result = {"hardware": hardware(), "threads": os.cpu_count(), "retrieval": {**setting, **rates}}
    scratch = OUTPUT.with_suffix(".partial")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, OUTPUT)
    for name, value in rates.items():
        print(f"{name:36s} {value:12,.3f}")
    print(f"\n{result['hardware']}; written to {OUTPUT.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
