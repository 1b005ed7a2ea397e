"""Replacements of ssh and pdsh for tests, which run all commands on this machine."""

import os
from pathlib import Path

import pytest

# Host `dead` is unreachable; host `bare` is reachable, but lacks this project.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
host=$1; shift
case $host in
dead) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255 ;;
bare) exit 1 ;;
esac
[ "$*" = "hostname -I" ] && exec echo 127.0.0.1
exec sh -c "$*"
"""
# pdsh replaces %n by the index of the machine. FIRST, OTHERS: sed scripts for the command of the first machine, and for
# those of the others.
PDSH = """#!/bin/sh
hosts=$5; shift 5
number=0
pids=
script=$FIRST
for host in $(echo "$hosts" | tr , ' '); do
    sh -c "$(echo "$*" | sed -e "s/%n/$number/" -e "$script")" &
    pids="$pids $!"
    number=$((number + 1))
    script=$OTHERS
done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
"""


def replace_programs(folder: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Put replacements of these programs first on the PATH."""
    for name in programs:
        path = folder / name
        path.write_text({"ssh": SSH, "pdsh": PDSH}[name])
        path.chmod(0o755)
    monkeypatch.setattr("trainer.training.hostfile.TIMEOUT_S", 300)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
