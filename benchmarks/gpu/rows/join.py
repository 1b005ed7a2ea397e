"""Row 5: the join of a million rows with a million queries, k = 8, in one partition: exact, and by inverted lists."""

import time

import numpy as np
import torch

from benchmarks.gpu.day import Cases, Day, Values, matrix_product, memory_gib, synchronize

AIM_EXACT_S = 3.1
"""Half of the H100's bf16 rate by its data sheet."""
MAX_S = 60.0
"""All queries are joined only if that is projected to take at most this long; else the projection is the result."""
CLUSTERS = 1024
LISTS_VISITED = 32


def cases(day: Day) -> Cases:
    return {"exact": lambda: measure(day, 0), f"{LISTS_VISITED} lists": lambda: measure(day, LISTS_VISITED)}


def measure(day: Day, lists: int) -> Values:
    """Seconds for all queries, and the share of the card's measured bf16 rate if every pair counts as compared."""
    from retrieval.join.join import join_partition
    from retrieval.recipe import JoinConfig

    rows, dim = (4_000, 64) if day.tiny else (1_000_000, 768)
    partition = write_partition(day, rows, dim)
    queries = clustered(day, rows, dim, seed=1).float().cpu().numpy()
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    config = JoinConfig(k=8, near_copy_similarity=0.96, partitions_per_query=1, lists_per_partition=lists)
    seconds = 0.0
    for count in (rows // 64, rows // 16, rows):
        # The first, small join also compiles and loads kernels: the second one projects.
        if count == rows and seconds * 16 > MAX_S:
            break
        began = time.perf_counter()
        join_partition(partition, queries[:count], config, str(day.device))
        synchronize()
        seconds, joined = time.perf_counter() - began, count
    whole = seconds * rows / joined
    values = {"rows": rows, "queries": joined, "seconds": round(seconds, 3), "seconds_for_all": round(whole, 2)}
    if lists:
        return {**values, "memory_gib": memory_gib()}
    share = 2 * rows**2 * dim / whole / matrix_product(day)
    return {**values, "aim": AIM_EXACT_S, "share_of_product": round(share, 4), "memory_gib": memory_gib()}


def clustered(day: Day, rows: int, dim: int, seed: int) -> torch.Tensor:
    """Rows around common centers, (rows, dim) float16 on the device, as CLIP vectors are; length about 1."""
    generator = torch.Generator(day.device).manual_seed(0)
    centers = torch.randn(CLUSTERS, dim, device=day.device, generator=generator)
    generator.manual_seed(seed)
    parts = []
    for first in range(0, rows, 100_000):
        count = min(100_000, rows - first)
        numbers = torch.randint(CLUSTERS, (count,), device=day.device, generator=generator)
        noise = torch.randn(count, dim, device=day.device, generator=generator)
        parts.append(torch.nn.functional.normalize(centers[numbers] + noise, dim=1).half())
    return torch.cat(parts)


def write_partition(day: Day, rows: int, dim: int):  # type: ignore[no-untyped-def]
    """A partition with the files that a join reads, written once: vectors sorted by list, and the lists."""
    from retrieval.file_cache import FileCache
    from retrieval.index.inverted_lists import num_lists
    from retrieval.index.kmeans import nearest_centroids, train_centroids
    from retrieval.index.partition import Partition
    from retrieval.storage.root import Root

    folder = day.scratch / f"partition-{rows}-{dim}"
    if not (folder / "lists.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vectors = clustered(day, rows, dim, seed=0).cpu().numpy()
        count = num_lists(rows)
        centroids = train_centroids(vectors[: 32 * count], count, seed=0)
        lists = nearest_centroids(vectors, centroids)[:, 0]
        np.save(folder / "embeddings.npy", vectors[np.argsort(lists, kind="stable")])
        np.save(folder / "list_centroids.npy", centroids)
        np.save(folder / "lists.npy", np.concatenate([[0], np.bincount(lists, minlength=count).cumsum()]))
    return Partition.open(FileCache(Root(folder.parent)), folder.name, dim, np.empty(0, np.int64))
