"""Kills a process, as far as files are concerned: a chosen write or deletion raises KeyboardInterrupt."""

import pytest

from retrieval import Root


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the process when it publishes or deletes files for this time."""
    calls = iter(range(number))

    def counted(method: str) -> None:
        original = getattr(Root, method)

        def call(*arguments: object) -> object:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(Root, method, call)

    for method in ("_publish", "delete", "delete_files"):
        counted(method)
