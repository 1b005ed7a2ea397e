"""A rank that checks what `raised_on_all` raises if rank 1 alone fails: `python -m failing_rank`."""

from pathlib import Path

import pytest

from retrieval.errors import NodeError, UserError
from trainer.engine.deepspeed_engine import join_ranks, leave_ranks, raised_on_all

if __name__ == "__main__":
    ranks = join_ranks(timeout_minutes=2)
    for kind in (UserError, NodeError):
        with pytest.raises(UserError) as caught, raised_on_all(ranks):
            if ranks.rank == 1:
                raise kind("no disk")
        assert caught.type is kind
        assert str(caught.value) == ("no disk" if ranks.rank == 1 else "rank 1: no disk")
    defect = ValueError if ranks.rank == 1 else RuntimeError
    with pytest.raises(defect) as raised, raised_on_all(ranks):
        if ranks.rank == 1:
            raise ValueError("no shape")
    message = "no shape" if ranks.rank == 1 else "rank 1: ValueError: no shape. The log of this rank has the traceback."
    assert str(raised.value) == message
    assert ranks.rank != 1 or raised.traceback[-1].path == Path(__file__)
    leave_ranks()
