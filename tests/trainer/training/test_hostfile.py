from pathlib import Path

import pytest

from retrieval.errors import UserError
from tests.trainer.training.machines import replace_programs
from trainer.training.hostfile import Host, check_hosts, needs_ssh, read_hosts


def test_a_hostfile_lists_machines_and_their_ranks_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("# ours\n\n  gpu-02 slots=8\nme@gpu-01.example\tslots=4  \n")
    assert read_hosts(path) == (Host("gpu-02", 8), Host("me@gpu-01.example", 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu-01 slots=8\ngpu-02 8\n", r"hosts.txt line 2: found 'gpu-02 8'. Write one line .*gpu-01 slots=8"),
        ("gpu-01 slots=0\n", "line 1: found 'gpu-01 slots=0'"),
        ("gpu-01 slots=8 fast\n", "line 1: found"),
        ("-oProxyCommand=id slots=8\n", "line 1: found"),
        ("gpu-01 slots=8\n\ngpu-01 slots=8\n", "line 3: gpu-01 occurs twice"),
        ("# none\n", "lists no machine"),
        ("\x00\xff", "line 1: found"),
    ],
)
def test_the_error_for_a_malformed_hostfile_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_hosts(path)
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        read_hosts(tmp_path / "nowhere.txt")


def test_ssh_is_needed_only_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    check_hosts((Host("localhost", 2),))
    assert needs_ssh((Host("gpu-01", 2),))
    with pytest.raises(UserError, match=r"pdsh is missing.*Install it"):
        check_hosts((Host("localhost", 2), Host("gpu-01", 2)))


def test_the_error_for_machines_that_cannot_train_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_programs(tmp_path, monkeypatch, "ssh", "pdsh")
    check_hosts((Host("good", 1), Host("localhost", 1)))
    with pytest.raises(UserError) as caught:
        check_hosts(tuple(Host(name, 1) for name in ("good", "dead", "bare")))
    assert "host dead does not answer ssh (ssh: connect to host dead port 22: No route" in str(caught.value)
    assert "host bare has no " in str(caught.value)
    assert "good" not in str(caught.value)


def test_the_check_of_a_machine_that_does_not_answer_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_programs(tmp_path, monkeypatch, "ssh", "pdsh")
    (tmp_path / "ssh").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("trainer.training.hostfile.TIMEOUT_S", 0.25)
    with pytest.raises(UserError, match="host mute did not answer ssh within"):
        check_hosts((Host("mute", 1), Host("localhost", 1)))
