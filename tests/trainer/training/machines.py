"""Other machines for tests: stand-ins for ssh and pdsh that run every command on this one."""

import os
from pathlib import Path

import pytest

# `dead` answers nothing; `bare` answers, but has nothing of ours.
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
# %n is the machine's number, as in pdsh.
PDSH = """#!/bin/sh
hosts=$5; shift 5
number=0
pids=
for host in $(echo "$hosts" | tr , ' '); do
    sh -c "$(echo "$*" | sed "s/%n/$number/")" &
    pids="$pids $!"
    number=$((number + 1))
done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Put `ssh` or `pdsh` first on the path."""
    for name in programs:
        path = folder / name
        path.write_text({"ssh": SSH, "pdsh": PDSH}[name])
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
