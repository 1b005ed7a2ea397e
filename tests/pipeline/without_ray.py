"""Runs `python <arguments>` for test_docs, with the shards of stages in its process: a Ray starts for ten seconds."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # The working folder is first: the tests have folders with the names of our packages.
    sys.path[:1] = [os.getcwd(), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from fork_server import run
    from shards_in_process import shards_in_process

    with shards_in_process():
        run(sys.argv[1:])
