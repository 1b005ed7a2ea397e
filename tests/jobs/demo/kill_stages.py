"""A program that kills stages: forks a process for each, which kills itself at the record of its first shard.

The forked processes share the imports of this one, and run their shards themselves. Reads JSON: the port of the demo's
server, and a list of stage, folder of the stage, recipe and overrides.
"""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from jobs.cli.recipe import load_recipe
from jobs.demo.server.server import open_port
from pipeline.runtime import pool
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

sys.path.append(str(Path(__file__).parents[2] / "pipeline"))


def run_until_first_record(stage: str, folder: Path, recipe: str, overrides: list[str]) -> None:
    from shards_in_process import shards_in_process

    write_record = pool.write_record

    def write_and_die(root: Root, name: str, fingerprint: str, record: ShardRecord) -> None:
        write_record(root, name, fingerprint, record)
        if root.local_path(name) == folder:
            os.kill(os.getpid(), signal.SIGKILL)

    pool.write_record = write_and_die
    with shards_in_process():
        import_module(f"jobs.{stage}").run(load_recipe(Path(recipe), overrides))


def kill_at_first_record(stage: str, folder: Path, recipe: str, overrides: list[str]) -> None:
    """Raises ValueError if the stage ended before."""
    process = os.fork()
    if not process:
        run_until_first_record(stage, folder, recipe, overrides)
        os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(process, 0)[1]):
        raise ValueError(f"{stage} ended before it was killed")


def wait_for_free_port(port: int) -> None:
    """Wait for the end of the demo's server, which ends after its parent."""
    while True:
        try:
            open_port(port).close()
            return
        except UserError:
            time.sleep(0.1)


if __name__ == "__main__":
    port, stages = json.load(sys.stdin)
    for module in ("pipeline.embed", "pipeline.neighbors.neighbors", *(f"jobs.{stage}" for stage, *_ in stages)):
        import_module(module)
    for stage, folder, recipe, overrides in stages:
        kill_at_first_record(stage, Path(folder), recipe, overrides)
        wait_for_free_port(port)
