"""A stage of resumable items has one process at a time."""

import os
from pathlib import Path

import pytest

from retrieval import Root, UserError
from retrieval.config import Config
from trainer.sampling.resumable import ResumableItems


def test_a_second_process_is_refused_and_deletes_no_unfinished_file(tmp_path: Path) -> None:
    root = Root(tmp_path)
    first, second = (ResumableItems(root, "runs/a/sample", Config(), {}) for _ in range(2))
    with first.building(), root.writing("runs/a/sample/picture.png") as pending:
        pending.path.write_bytes(b"half")
        told = f"runs/a/sample: process {os.getpid()} on .* has worked on it since"
        with pytest.raises(UserError, match=told), second.building():
            pass
        assert pending.path.read_bytes() == b"half"
    with second.building():
        pass
