"""`make bench-scale`: 231,350 shards in an object store that answers each request after 30 ms.

The records of all shards (`records`), then a sample of tiny shards through every data stage (`stages`). About 15
minutes on two free cores. Writes `docs/scale.json` after each of the two parts and `docs/scale.md` once it has both;
`--parts` measures one of them and keeps the other.
"""

import json
from functools import partial
from typing import Any

from benchmarks.common.processes import in_new_process
from benchmarks.common.report import Goal, benchmark_parser, machines, write_part
from benchmarks.scale import records, stages
from benchmarks.scale.store import REQUEST_S, running_store
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table

BEFORE = {
    "write the manifest": "37 s, 2.15 GB, 181 MB of JSON",
    "read the manifest": "7.7 s",
    "list the stage": "0.16 s of CPU a page: 111 s",
    "resume, stage finished": "463,000 requests",
    "resume, stage unfinished": "5 requests and 14 ms a shard: 54 minutes",
    "delete the stage": "3.1 requests a file: 18 hours",
    "open a database of 1,900 partitions": "9,500 requests: 5 minutes",
}
"""What earlier versions of the code took at 231,350 shards, measured on a part of them and multiplied."""

PAGE = """# All shards of LAION-2B in an object store

`make bench-scale`, on {hardware}. The store is a process on this machine that answers each request after {ms:.0f} ms.
Requests, bytes, memory and CPU time do not depend on the load of the machine; the time does, and other work ran on
this machine during the measurement if the time is far above CPU time plus {ms:.0f} ms a request. {remark}

{goals}

## The records of {shards:,} shards

Each shard has two files of one byte, so these are the costs of records and requests. Each row is a new process;
memory is the larger of its peak and {base:.2f} GB, which the system reports before the case begins: imported
libraries, and the memory of the process that starts it. CPU is that of the process, without the store. "Before" is
an earlier version of the code, measured on a part of the shards and multiplied.

`list the stage` is one listing, page after page. Where the shards are known, for example when a stage is resumed, eight
parts of the listing are requested at once.

{records}

## A sample through every data stage

A metadata file of {rows} rows becomes a training shard and a database shard. After a smaller run, every stage runs on
{files[0]} and on {files[1]} of these files, with two workers on Ray that read and write in the store. Requests, bytes,
CPU and memory are the difference of the two runs divided by the difference of the files, so the start does not count.
Time is that of the larger run divided by its files, with the start of its workers. CPU and memory are those of the
driver; memory is the growth of its Python objects. With so few files, differences of 10 kB and 10 ms are noise.
`index` and `neighbors` also work on partitions, whose number grows here with the rows.

{stages}

Rates of the stages themselves are in [pipeline.md](pipeline.md) and [download.md](download.md).
"""
PARTS = ("records", "stages")


def measure(part: str, shards: int) -> dict[str, Any]:
    """Measure the records, or the stages in a new process, so that its memory can be counted."""
    if part == "records":
        with running_store(partial(records.fill, shards)) as store:
            cases = records.measure(shards, store)
            return {"shards": shards, "records": cases, "remark": ""}
    return {"files": list(stages.FILES), "stages": in_new_process(stages.measure_samples)}


def goals(result: dict[str, Any]) -> list[Goal]:
    """The goals, with the measured values."""
    resumed = [result["records"][f"resume, stage {state}"] for state in ("finished", "unfinished")]
    return [
        Goal("resume, time", 60, max(case["seconds"] for case in resumed), True, " s"),
        Goal("resume, memory", 1, max(case["memory_gb"] for case in resumed), True, " GB"),
    ]


def _record_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            *(name, f"{case['requests']:,.0f}", f"{case['bytes'] / 1e6:,.1f} MB", f"{case['seconds']:,.1f} s"),
            *(f"{case['cpu_s']:,.1f} s", f"{case['memory_gb']:.2f} GB", BEFORE.get(name, "")),
        ]
        for name, case in result["records"].items()
    ]


def _stage_rows(result: dict[str, Any]) -> list[list[str]]:
    small, large = result["stages"]
    files = result["files"][1] - result["files"][0]  # more in the large sample
    rows = []
    for name in large:
        names = ("requests", "bytes", "cpu_s", "peak_bytes")
        each = {key: (large[name][key] - small[name][key]) / files for key in names}
        rows.append(
            [
                *(
                    name,
                    f"{each['requests']:.1f}",
                    f"{each['bytes'] / 1e3:,.1f} kB",
                    f"{large[name]['seconds'] / result['files'][1]:.2f} s",
                ),
                *(f"{1e3 * each['cpu_s']:.1f} ms", f"{each['peak_bytes'] / 1e3:.1f} kB"),
            ]
        )
    return rows


def page(result: dict[str, Any]) -> str:
    heads = ["", "requests:", "bytes:", "time:", "CPU:", "memory:", "before"]
    stage_heads = ["stage", "requests:", "bytes:", "time:", "driver CPU:", "driver memory:"]
    return PAGE.format(
        hardware=machines(result["hardware"]),
        shards=result["shards"],
        files=[f"{count:,}" for count in result["files"]],
        ms=1e3 * REQUEST_S,
        base=max(case["base_gb"] for case in result["records"].values()),
        rows=stages.ROWS_PER_FILE,
        goals=markdown_table(["", "goal:", "measured:", ""], [goal.cells for goal in goals(result)]),
        records=markdown_table(heads, _record_rows(result)),
        stages=markdown_table(stage_heads, _stage_rows(result)),
        remark=result["remark"],
    )


def main() -> None:
    parser = benchmark_parser("scale", __doc__)
    parser.add_argument("--shards", type=int, default=231_350, help="number of shards whose records are measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts that are measured")
    options = parser.parse_args()
    stored = options.docs / "scale.json"
    result = json.loads(stored.read_text()) if stored.exists() else {}
    for part in options.parts:
        result |= measure(part, options.shards)
        result["hardware"] = result.get("hardware", {}) | {part: hardware()}
        write_part(stored, result, PARTS, page)


if __name__ == "__main__":
    main()
