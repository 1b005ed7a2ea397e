"""`make gpu-day`: its bookkeeping, its page, and the bundles of wheels. A rehearsal of the fast rows runs on a CPU."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import wheels
from benchmarks.gpu.__main__ import Call, failure, run_row
from benchmarks.gpu.page import TITLES, page

POPEN = subprocess.Popen
MACHINE = {"device": "CPU", "hardware": "test", "torch": "2", "numpy": "2"}


@pytest.fixture
def run_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures row `join` with these cases, each the end of a child: its values, an error, or None for its alarm.

    A minute passes with each reading of the clock.
    """
    clock = itertools.count(0, 60)

    def run(cases: dict[str, Any], retry: bool = False, row_minutes: float = 60.0) -> dict[str, Any]:
        body = [f"import os, sys, json, signal; done = json.load(open({str(tmp_path / 'gpu.json')!r}))"]
        body += ["done = done['rows']['join']['cases']"]
        for case, outcome in cases.items():
            action = f"print('RESULT', json.dumps({outcome!r}), flush=True)"
            if isinstance(outcome, str):
                action = f"sys.exit({outcome!r})"
            if outcome is None:
                action = "os.kill(os.getpid(), signal.SIGALRM)"
            body += [f"if {case!r} not in done: print('CASE {case}', flush=True); {action}"]
        monkeypatch.setattr(
            program.subprocess, "Popen", lambda _, **options: POPEN([sys.executable, "-c", "\n".join(body)], **options)
        )
        monkeypatch.setitem(program.ROWS, "join", row_minutes)
        monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        monkeypatch.setattr(program, "_machine", lambda: MACHINE)
        call = Call(tmp_path, tmp_path, True, retry, next(clock) + 1800)
        results = call.read()
        run_row("join", call, results)
        return dict(json.loads((tmp_path / "gpu.json").read_text())["rows"]["join"]["cases"])

    return run


def test_a_case_that_fails_is_recorded_and_the_next_goes_on(run_cases: Any) -> None:
    error = "Traceback (most recent call last):\n  File x\nValueError: bad\nshape"
    assert run_cases({"a": {"seconds": 1}, "b": error, "c": {"seconds": 2}}) == {
        "a": {"seconds": 1},
        "b": {"failed": ["ValueError: bad", "shape"]},
        "c": {"seconds": 2},
    }


def test_finished_and_failed_cases_are_not_measured_again_unless_they_are_retried(run_cases: Any) -> None:
    run_cases({"a": {"seconds": 1}, "b": "Traceback (most recent call last):\nValueError: bad"})
    changed = {"a": {"seconds": 9}, "b": {"seconds": 9}}
    assert run_cases(changed)["b"] == {"failed": ["ValueError: bad"]}
    assert run_cases(changed, retry=True) == {"a": {"seconds": 1}, "b": {"seconds": 9}}


def test_a_case_whose_library_is_missing_is_measured_by_the_next_call(run_cases: Any) -> None:
    missing = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'deepspeed'"
    assert run_cases({"a": missing, "b": {"seconds": 1}})["a"] == {"needs": "deepspeed"}
    assert run_cases({"a": {"seconds": 2}})["a"] == {"seconds": 2}


def test_the_end_of_a_call_leaves_its_case_to_the_next_call(run_cases: Any) -> None:
    assert run_cases({"a": {"seconds": 1}, "b": None}) == {"a": {"seconds": 1}}


def test_the_end_of_the_minutes_of_a_row_is_recorded(run_cases: Any) -> None:
    cases = run_cases({"a": None, "b": {"seconds": 1}}, row_minutes=1.0)
    assert cases == {"a": {"failed": ["stopped: the row's 1 minutes were over"]}}


def test_all_rows_fit_in_half_an_hour_with_the_start_of_the_machine() -> None:
    assert sum(program.ROWS.values()) <= 28


def test_results_of_another_device_are_not_continued(run_cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cases({"a": {"seconds": 1}})
    monkeypatch.setitem(MACHINE, "device", "other")
    with pytest.raises(SystemExit, match="has results of CPU, this is other"):
        run_cases({"a": {"seconds": 1}})


def test_an_error_without_a_traceback_is_kept() -> None:
    assert failure("") == {"failed": ["no error message"]}
    assert failure("Segmentation fault") == {"failed": ["Segmentation fault"]}


def test_the_page_has_a_table_for_each_row_with_failures_and_profiles() -> None:
    assert list(TITLES) == list(program.ROWS)
    cases = {
        "256 px": {"images_per_s": 1234.5, "mfu": 0.512, "tried": {"1": 2}},
        "512 px": {"failed": ["OutOfMemoryError: a|b", "end"]},
        "profile": {"profile": [["mm", 3, 1.5, 0.25]]},
    }
    text = page({"machine": MACHINE, "rows": {"steps": {"seconds": 1, "cases": cases}, "join": {"cases": {}}}})
    assert "| 256 px | 1,234 | 51.2% |  |" in text
    assert "| 512 px |  |  | OutOfMemoryError: a/b ... end |" in text
    assert "| mm | 3 | 1.5 | 25.0% |" in text
    assert "million queries\n\nNot run." in text


def test_wheels_are_packed_into_bundles_that_can_be_transferred() -> None:
    sizes = {"a": 50, "b": 30, "c": 20, "d": 4}
    files = [(Path(name), size * 2**20) for name, size in sizes.items()]
    assert [[file.name for file in bundle] for bundle in wheels.bundles(files, 54)] == [["a", "d"], ["b", "c"]]
    with pytest.raises(SystemExit, match="more than --mib 49"):
        wheels.bundles(files, 49)


def test_the_fast_rows_run_on_a_cpu(tmp_path: Path, forked_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(forked_python))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--scratch", str(tmp_path), "--only", "join", "latents"])
    program.main()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [list(row["cases"]) for row in rows.values()] == [["exact", "32 lists"], ["256 px", "512 px", "768 px"]]
    assert not [values for row in rows.values() for values in row["cases"].values() if "failed" in values]
    assert rows["join"]["cases"]["exact"]["queries"] == rows["join"]["cases"]["exact"]["rows"]
