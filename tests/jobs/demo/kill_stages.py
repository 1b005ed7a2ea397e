"""A program that kills stages: forks a process for each, and kills it at the record of its first shard.

The forked processes share the imports of this one, and run their shards themselves. Reads JSON: a list of stage,
folder of the stage, recipe and overrides.
"""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from jobs.cli.recipe import load_recipe

sys.path.append(str(Path(__file__).parents[2] / "pipeline"))


def run(stage: str, recipe: str, overrides: list[str]) -> None:
    from shards_in_process import shards_in_process

    with shards_in_process():
        import_module(f"jobs.{stage}").run(load_recipe(Path(recipe), overrides))


def kill_at_first_record(stage: str, folder: Path, recipe: str, overrides: list[str]) -> None:
    """Raises ValueError if the stage ended before."""
    process = os.fork()
    if not process:
        run(stage, recipe, overrides)
        os._exit(0)
    while not list(folder.glob("records/**/[!.]*.json")):
        if os.waitpid(process, os.WNOHANG)[0]:
            raise ValueError(f"{stage} ended before it could be killed")
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if stage == "download":
        time.sleep(1)  # the demo's server ends after its parent, which frees the port


if __name__ == "__main__":
    stages = json.load(sys.stdin)
    for module in ("pipeline.embed", "pipeline.neighbors.neighbors", *(f"jobs.{stage}" for stage, *_ in stages)):
        import_module(module)
    for stage, folder, recipe, overrides in stages:
        kill_at_first_record(stage, Path(folder), recipe, overrides)
