"""Kills a process, as far as files are concerned: a chosen write or deletion raises KeyboardInterrupt."""

import pytest

from retrieval import Root
from retrieval.storage import lease


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the process when it publishes or deletes files for this time."""
    calls = iter(range(number))
    patch.setattr(lease, "HEARTBEAT_S", 1e6)  # a renewal of the lease would be counted

    def counted(method: str) -> None:
        original = getattr(Root, method)

        def call(*arguments: object) -> object:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(Root, method, call)

    for method in ("_publish", "delete", "delete_files"):
        counted(method)


def kill_at_deletion(patch: pytest.MonkeyPatch, name: str) -> None:
    """Kill the process when it deletes a file or folder of this name."""
    delete = Root.delete

    def call(root: Root, deleted: str) -> None:
        if deleted == name:
            kill_at(patch, 0)
            raise KeyboardInterrupt
        delete(root, deleted)

    patch.setattr(Root, "delete", call)
