"""The inverted lists nearest to the queries of a join, by the centroids of the lists.

Queries and centroids are compared in the principal axes of the centroids. A CPU compares a query only with the
centroids in the groups nearest to it, because comparing all of them would take more time than the rows of the lists.
"""

import math

import numpy as np
import torch
from torch import Tensor

from retrieval.index.torch_products import has_bfloat16, multiply

ROUTED_DIMENSIONS = 256
"""Principal axes of the centroids in which lists are chosen; recall is the same with all 768."""
GROUP = 16
"""Lists per group; only the best list of a group is considered for the threshold of visited lists."""
MIN_GROUPED_LISTS = 4096
"""Fewer centroids are compared with every query."""
LISTS_PER_CLUSTER = 128
"""Mean number of similar centroids that are compared at once."""
VISITED_SHARE = 0.25
SPARE_LISTS = 8
"""A query is compared with this share of the centroids, and at least with so many times the lists that it visits."""
ITERATIONS = 5


class ListRouter:
    """The centroids of the lists of a partition."""

    def __init__(self, centroids: Tensor) -> None:
        """centroids: (lists, dim) float32 on the device that computes."""
        centroids = centroids - centroids.mean(dim=0)
        self._axes = torch.linalg.eigh(centroids.T @ centroids).eigenvectors[:, -ROUTED_DIMENSIONS:].bfloat16()
        targets = multiply(centroids.bfloat16(), self._axes)
        is_grouped = targets.device.type == "cpu" and len(targets) >= MIN_GROUPED_LISTS
        self._means, nearest = _clusters(targets.float(), len(targets) // LISTS_PER_CLUSTER if is_grouped else 1)
        self._order = nearest.argsort(stable=True)
        self._ends = torch.bincount(nearest, minlength=len(self._means)).cumsum(0).tolist()
        # Where bfloat16 is multiplied as float32, the centroids are converted once.
        self._targets = targets[self._order].to(torch.bfloat16 if has_bfloat16(targets.device) else torch.float32)

    def nearest(self, queries: Tensor, lists: int) -> tuple[Tensor, Tensor, Tensor]:
        """The list nearest to each query (n,), and pairs of query and list: at least the `lists` nearest of each.

        queries: (n, dim) bfloat16.
        """
        projected = multiply(queries, self._axes)
        total, clusters = len(self._targets), len(self._means)
        visited = math.ceil(clusters * max(VISITED_SHARE, SPARE_LISTS * lists / total))
        if 2 * visited < clusters:
            similarities = self._in_clusters(projected, visited)
        else:
            similarities = multiply(projected, self._targets.T)
        first, places = nearest_columns(similarities, lists)
        query = torch.div(places, total, rounding_mode="floor")
        return self._order[first], query, self._order[places - query * total]

    def _in_clusters(self, queries: Tensor, visited: int) -> Tensor:
        """Similarities (n, lists) bfloat16 to the centroids in so many clusters nearest to a query; else -inf."""
        nearest = (queries.float() @ self._means.T).topk(visited, dim=1).indices
        is_visited = torch.zeros((len(self._means), len(queries)), dtype=torch.bool).T.scatter_(1, nearest, True).T
        queries = queries.to(self._targets.dtype)
        similarities = torch.full((len(queries), len(self._targets)), -torch.inf, dtype=torch.bfloat16)
        start = 0
        for visitors, end in zip(is_visited, self._ends, strict=True):
            numbers = visitors.nonzero()[:, 0]
            products = queries.index_select(0, numbers) @ self._targets[start:end].T
            similarities[:, start:end].index_copy_(0, numbers, products.bfloat16())
            start = end
        return similarities


def _clusters(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (count, dim) of clusters of similar rows, and the cluster of each row. targets: (n, dim) float32."""
    means = targets[:: max(len(targets) // count, 1)][:count].clone()
    for _ in range(ITERATIONS if count > 1 else 1):
        nearest = (targets @ torch.nn.functional.normalize(means, dim=1).T).max(dim=1).indices
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(means).index_add_(0, nearest, targets)
        means = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), means)
    return means, nearest


def nearest_columns(similarities: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """The best column of each row (n,), and flat indices of at least the `lists` best ones.

    similarities: (n, all lists) bfloat16. Columns are chosen by a limit, the `lists`-th largest of the group
    maxima. With many groups few other columns reach it; it takes a third of the time of a top-k of all columns.
    """
    num_lists = similarities.shape[1]
    size = GROUP if num_lists % GROUP == 0 and num_lists >= 8 * GROUP * lists else 1
    groups = similarities.view(len(similarities), size, -1)
    largest, columns = groups.amax(dim=1).topk(lists, dim=1)
    inside = groups.gather(2, columns[:, :1, None].expand(-1, size, -1))[:, :, 0].argmax(dim=1)
    return inside * groups.shape[2] + columns[:, 0], at_least(similarities, largest[:, -1:])


def at_least(products: Tensor, limits: Tensor) -> Tensor:
    """Flat indices of the products that reach the limit of their row; all of a row with a limit <= 0.

    products: (n, m) bfloat16; limits: (n, 1) or (1, 1).
    """
    if products.device.type != "cpu":
        return ((products >= limits) | (limits <= 0)).flatten().nonzero()[:, 0]
    # Bit patterns of positive numbers have the order of the numbers; NumPy compares them thirty times faster.
    bits = limits.view(torch.int16).masked_fill(limits <= 0, torch.iinfo(torch.int16).min)
    return torch.from_numpy(np.flatnonzero(products.view(torch.int16).numpy() >= bits.numpy()))
