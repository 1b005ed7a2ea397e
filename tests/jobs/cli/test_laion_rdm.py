"""The console command: it lists all commands at once, and runs each as `python -m` does."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.cli import laion_rdm
from jobs.cli.laion_rdm import COMMANDS, DATABASE_COMMANDS, main
from retrieval.cli import commands

REPOSITORY = Path(__file__).resolve().parents[3]
DEMO = str(REPOSITORY / "jobs/configs/demo.toml")


def test_help_lists_every_command_and_imports_no_package_of_the_project() -> None:
    program = (
        "import sys; from jobs.cli.laion_rdm import main; main(['--help']);"
        "print([name for name in ('retrieval', 'pydantic', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    for name, command in COMMANDS.items():
        assert f"  {name:<10} {command.about}" in lines


def test_every_command_has_a_module_with_a_main() -> None:
    for command in COMMANDS.values():
        spec = find_spec(command.module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text()
        assert "def main(argv" in text or "main = stage_command(" in text, command.module


def test_every_stage_of_the_makefile_is_a_command() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    stages = next(line for line in makefile.splitlines() if line.startswith("STAGES := "))
    assert set(stages.split()[2:]) <= set(COMMANDS)


def test_a_command_gets_the_remaining_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    main(["filter", DEMO, "--dry-run", "--set", "filter.min_edge=99"])
    assert '"min_edge": 99' in capsys.readouterr().out


def test_the_help_of_a_module_that_is_no_command_shows_how_it_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.demo.report.__main__ import main as make_report

    with pytest.raises(SystemExit):
        make_report(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m jobs.demo.report ")


def test_dry_runs_of_stages_that_compute_with_torch_do_not_import_it() -> None:
    program = (
        "import sys; from jobs.cli.laion_rdm import main;"
        "[main([stage, sys.argv[1], '--dry-run']) for stage in ('embed', 'neighbors', 'train', 'evaluate')];"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, DEMO]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_database_commands_are_those_of_python_m_retrieval(capsys: pytest.CaptureFixture[str]) -> None:
    assert {*DATABASE_COMMANDS} == {*commands.COMMANDS}
    for name in DATABASE_COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"retrieval {name}" in capsys.readouterr().out.replace("laion-rdm", "retrieval")


@pytest.mark.parametrize(
    ("name", "hint"), [("filtr", "Did you mean 'filter'?"), ("xyz", "laion-rdm --help lists all commands.")]
)
def test_an_unknown_command_gets_a_hint(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: laion-rdm has no command {name!r}. {hint}\n"


def test_a_missing_package_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jobs.explore.__main__", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["explore", DEMO])
    assert stopped.value.code == 2
    assert "needs the package uvicorn" in (message := capsys.readouterr().err)
    assert "pip install 'laion-rdm[page]'" in message


def test_a_missing_module_of_the_project_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    command = laion_rdm.Command("jobs.no_such_module", "train", "")
    monkeypatch.setitem(laion_rdm.COMMANDS, "broken", command)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["broken"])


def test_every_extra_is_declared() -> None:
    declared = (REPOSITORY / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for command in COMMANDS.values():
        for extra in filter(None, command.extra.split(",")):
            assert f"\n{extra} = [" in declared
