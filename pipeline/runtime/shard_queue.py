"""The shards that are to be processed, and what follows from a failure. Uses no Ray.

A failed shard is tried on another node first. A shard that fails too often is parked; the others go on. A node where
shards fail that succeed elsewhere is set aside, and its failures no longer count. The stage stops if no node succeeds.
"""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retrieval.errors import UnfinishedError

MAX_ERRORS = 3
"""Errors of one shard after which it is parked."""
MAX_LOST_WORKERS = 4
"""Workers that one shard may lose (killed, out of memory) before it is parked. Lost nodes do not count."""
SICK_AFTER = 3
"""Shards that failed on a node without a success there, and then succeeded elsewhere: the node is set aside."""
MAX_IN_A_ROW = 6
"""Failures in a row of each worker, on all nodes, after which the stage stops."""
PAUSE_S, MAX_PAUSE_S = 5.0, 60.0
"""Pause of a worker after the first failure in a row of its node, doubled with each further one, and its limit."""
LISTED = 20
"""Failed shards that the error at the end lists."""

Kind = Literal["error", "node", "loss"]
"""An exception of a shard, a NodeError, or a lost worker."""


@dataclass(frozen=True)
class Failure:
    """A failed attempt. node: its id."""

    node: str
    kind: Kind
    message: str


class ShardQueue:
    """Shards of a stage that are not finished."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.parked: dict[str, str] = {}
        """The last error of each parked shard."""
        self.sick_nodes: set[str] = set()
        self._fresh = deque(shards)
        self._retries: list[str] = []
        self._failures: dict[str, list[Failure]] = {}
        self._in_a_row: Counter[str] = Counter()
        """Failures of each node since its last success."""
        self._blame: Counter[str] = Counter()
        """For each node: shards that failed there and succeeded elsewhere since its last success."""

    def __len__(self) -> int:
        """Number of shards that wait for a worker."""
        return len(self._fresh) + len(self._retries)

    def take(self, node: str, nodes: Collection[str]) -> str | None:
        """Remove and return the next shard for a worker on a node; None if it has to wait for another node.

        nodes: those of all workers. Shards that failed elsewhere come first, those that failed here last.
        """
        for shard in self._retries:
            if node not in self._nodes(shard):
                self._retries.remove(shard)
                return shard
        if self._fresh:
            return self._fresh.popleft()
        for shard in self._retries:
            if self._nodes(shard).issuperset(nodes):
                self._retries.remove(shard)
                return shard
        return None

    def succeeded(self, shard: str, node: str) -> set[str]:
        """Note that a shard succeeded on a node. Returns the nodes that are set aside because of that."""
        self._in_a_row[node] = self._blame[node] = 0
        others = {failure.node for failure in self._failures.pop(shard, ())} - {node} - self.sick_nodes
        self._blame.update(others)
        sick = {other for other in others if self._blame[other] >= SICK_AFTER}
        self.sick_nodes |= sick
        for parked in [shard for shard in self.parked if sick and not self._is_given_up(shard)]:
            del self.parked[parked]
            self._retries.append(parked)
        return sick

    def failed(self, shard: str, failure: Failure) -> bool:
        """Note that a shard failed. Returns whether it is parked now."""
        self._in_a_row[failure.node] += 1
        self._failures.setdefault(shard, []).append(failure)
        if self._is_given_up(shard):
            self.parked[shard] = failure.message
            return True
        self._retries.append(shard)
        return False

    def put_back(self, shard: str) -> None:
        """Return a shard whose attempt was ended from outside; the attempt does not count."""
        self._fresh.appendleft(shard)

    def pause_s(self, node: str, num_workers: int) -> float:
        """Seconds that a worker waits after a failure of its node. num_workers: those on the node."""
        rounds = -(-self._in_a_row[node] // num_workers)
        return min(PAUSE_S * 2.0 ** (rounds - 1), MAX_PAUSE_S) if rounds else 0.0

    def is_hopeless(self, workers: Mapping[str, int]) -> bool:
        """Whether every node fails: each worker MAX_IN_A_ROW times since a success. workers: number by node."""
        return all(self._in_a_row[node] >= MAX_IN_A_ROW * count for node, count in workers.items())

    def check(self, stage: str, reason: str = "") -> None:
        """Raise UnfinishedError if a shard is not finished. reason: why the stage stopped before the end."""
        errors = self.parked | {shard: self._failures[shard][-1].message for shard in self._retries}
        if not errors and not reason:
            return
        counts = {"failed": len(errors), "were not tried": len(self._fresh)}
        texts = [reason, *(f"{count:,} shards {fate}" for fate, count in counts.items() if count)]
        summary = "; ".join(text for text in texts if text)
        lines = [f"{stage}: {summary}. The others are finished and kept; the same command tries these again."]
        lines += [f"  {shard}: {errors[shard]}" for shard in sorted(errors)[:LISTED]]
        if len(errors) > LISTED:
            lines.append(f"  and {len(errors) - LISTED:,} more")
        raise UnfinishedError("\n".join(lines))

    def _nodes(self, shard: str) -> set[str]:
        return {failure.node for failure in self._failures[shard]}

    def _is_given_up(self, shard: str) -> bool:
        kinds = Counter(failure.kind for failure in self._failures[shard] if failure.node not in self.sick_nodes)
        return kinds["loss"] >= MAX_LOST_WORKERS or kinds.total() - kinds["loss"] >= MAX_ERRORS
