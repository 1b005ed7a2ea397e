"""A sample of tiny shards through every data stage, in the store: what a shard costs in requests, memory and time.

Each stage runs on Ray with two workers. The memory of the driver is counted by tracemalloc, because a few kilobytes a
shard do not show in the peak memory of a process.
"""

import os
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.crashes.data_set import STAGES, SmallDataSet, served_data_set
from benchmarks.scale.store import BUCKET, RunningStore, Store, running_store
from jobs import latents
from jobs.cli.recipe import Recipe
from pipeline.runtime.stage import map_in_threads
from retrieval.cluster.connection import ray_connection
from retrieval.storage.root import Root
from trainer.model.patch_autoencoder import PatchAutoencoder, PatchShape
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig

ROWS_PER_FILE = 6
"""Rows of a metadata file, which becomes a shard of about four training images and one of two database images."""
LATENTS = "latents/16"
WARM_UP_FILES, FILES = 4, (10, 30)
"""Metadata files of the samples. The first run imports libraries and is not counted."""


def measure_samples() -> list[dict[str, Any]]:
    """Run the samples in this process. Returns those of FILES, by stage."""
    with running_store(_leave_empty) as store:
        measure(WARM_UP_FILES, store)
        return [measure(count, store) for count in FILES]


def _leave_empty(store: Store) -> None:
    """The sample's store has no files at first."""


def measure(files: int, store: RunningStore) -> dict[str, dict[str, float]]:
    """Run every stage on a data set with this number of metadata files. Results by stage."""
    os.environ.update(store.environment())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rdm-")))
        url = f"s3://{BUCKET}/sample-{files}"
        data_set = SmallDataSet(folder, ROWS_PER_FILE * files, files, f"{url}/metadata")
        stack.enter_context(served_data_set(folder, 0, data_set=data_set))
        root = Root(url)
        paths = sorted((folder / "metadata").iterdir())
        map_in_threads(lambda path: root.write_bytes(f"metadata/{path.name}", path.read_bytes()), paths)
        recipe = _latents_recipe(folder, root)
        stack.enter_context(ray_connection())
        tracemalloc.start()
        runs: dict[str, Callable[[], object]] = {name: partial(data_set.run, name, root, 2) for name in STAGES}
        runs[LATENTS] = partial(latents.run, recipe)
        results = {}
        for name, run in runs.items():
            results[name] = _measured(run, store)
            print(files, name, results[name], flush=True)
        return results


def _latents_recipe(folder: Path, root: Root) -> Recipe:
    PatchAutoencoder(PatchShape(hidden=8, blocks=1)).save(folder / "autoencoder")
    autoencoder = AutoencoderConfig(kind="patch", path=str(folder / "autoencoder"))
    sections = {"autoencoder": autoencoder, "latents": LatentsConfig(size=16, workers=2)}
    return Recipe(folder / "recipe.toml", (), root, dict(sections))


def _measured(run: Callable[[], object], store: RunningStore) -> dict[str, Any]:
    """Requests, bytes, seconds, CPU seconds of this process, and the peak growth of its Python objects, of a stage."""
    counts = store.counts()
    tracemalloc.reset_peak()
    python, _ = tracemalloc.get_traced_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": tracemalloc.get_traced_memory()[1] - python,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        **(store.counts() - counts),
    }
