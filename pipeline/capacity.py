"""Estimates of what the data stages need at a given size: storage, bandwidth, CPU and GPU time, hours, cost.

Reads and writes no files: arithmetic on the settings of a recipe and on rates with their sources. All needs
are linear in rows, with two exceptions: the number of partition centroids grows with the rows, and each row is compared
with all of them; the hash of each database image is compared with those of all training images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.pictures.near_copy_shards import ROWS_PER_GROUP
from pipeline.recipe import NeighborsConfig
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.recipe import IndexConfig

MICROSECOND = 1e-6
PICOSECOND = 1e-12
PUBLISHED_EDGE = 384
"""Shorter edge in pixels of the images that `rates.image_database` states the size of."""
MEASURED_DIM = 768
"""Dimension of the vectors in the measurements of `rates.index_*` and `rates.match_cpu`."""
FLOAT16_BYTES = 2
KEY_BYTES = 16.5
"""Bytes a row in the temporary files of filter (selection.KEY_SCHEMA)."""
HASH_BYTES = 24
"""Bytes of an image in the hashes of `near_copies/` (near_copies.HASHES)."""


class Rate(Config):
    """A number with its unit and source."""

    value: float = Field(gt=0)
    """Amount in `unit`."""
    unit: str = Field(min_length=1)
    """For example `us of CPU a row`."""
    source: str = Field(pattern="^(measured|published|assumed)")
    """Measured, published or assumed; then where or why."""


class Sizes(Config):
    """Sizes that the recipe does not contain."""

    metadata_rows: PositiveInt
    """Rows in the metadata."""
    database_images: PositiveInt
    """Database images that are downloaded and kept."""
    database_source: str = "assumed"
    """Source of `database_images`, as those of rates."""
    training: tuple[str, ...] = Field(strict=False)
    """Recipes that train on the data, relative to the input file."""


class Machines(Config):
    """Equal machines that run one stage at a time; all numbers but `count` are those of one machine."""

    count: PositiveInt
    cpus: PositiveInt
    gpus: NonNegativeInt
    gbit_s: PositiveFloat
    """Network bandwidth, both directions together."""
    dollars_per_hour: float = Field(ge=0)
    source: str = Field(min_length=1)
    """Source of the price."""


class Prices(Config):
    """Prices other than those of machines."""

    storage_dollars_per_tb_month: float = Field(ge=0)
    """Price of 10^12 bytes for a month."""


class PartitionShares(Config):
    """Share of the true neighbors in the partitions nearest to a query: `neighbors.min_recall` is planned with it."""

    partitions: PositiveInt
    """Partitions of the measured database."""
    visited: tuple[PositiveInt, ...] = Field(strict=False)
    """Numbers of the nearest partitions, ascending."""
    shares: tuple[float, ...] = Field(strict=False)
    """The share of each number."""
    source: str = Field(pattern="^(measured|assumed)")

    @model_validator(mode="after")
    def _fits(self) -> "PartitionShares":
        if not self.visited or len(self.visited) != len(self.shares):
            raise ValueError(f"{len(self.visited)} numbers in visited but {len(self.shares)} shares: give one for each")
        if not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares must be in [0, 1], got {self.shares}")
        for name, values in (("visited", self.visited), ("shares", self.shares)):
            if list(values) != sorted(values):
                raise ValueError(f"{name} must ascend, got {values}")
        return self

    def fewest(self, recall: float) -> tuple[int, float]:
        """The fewest visited partitions with this recall, and their share. Raises UserError if it is out of reach."""
        for visited, share in zip(self.visited, self.shares, strict=True):
            if share >= recall:
                return visited, share
        raise UserError(
            f"neighbors.min_recall = {recall:g} cannot be planned: {self.visited[-1]} of {self.partitions:,} partitions"
            f" hold {self.shares[-1]:.3f} ({self.source}). Lower it, or add larger numbers to [partitions]."
        )


class LinearityCheck(Config):
    """A rate measured at several sizes: if it is constant, the stage is linear."""

    what: str
    """Name of the rate with its unit."""
    sizes: tuple[PositiveInt, ...] = Field(strict=False)
    """Numbers of rows at which the values were measured."""
    values: tuple[PositiveFloat, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _fits(self) -> "LinearityCheck":
        if len(self.sizes) != len(self.values):
            raise ValueError(f"{len(self.sizes)} sizes but {len(self.values)} values")
        return self


class Inputs(Config):
    """The input file."""

    sizes: Sizes
    rates: dict[str, Rate]
    machines: dict[str, Machines]
    """`cpu` for stages without GPUs, `gpu` for the others."""
    prices: Prices
    partitions: PartitionShares | None = None
    """For recipes with `neighbors.min_recall`."""
    checks: tuple[LinearityCheck, ...] = Field((), strict=False)

    def rate(self, name: str) -> float:
        """The value of a rate. Raises UserError if the input file does not have it."""
        if name not in self.rates:
            raise UserError(f"the inputs have no [rates.{name}]: give it a value, a unit and a source.")
        return self.rates[name].value


@dataclass(frozen=True)
class StageNeed:
    """Total needs of a stage, in bytes and in seconds of one CPU or one GPU."""

    stage: str
    rates: tuple[str, ...]
    """Names of the rates in the estimate."""
    kept: float = 0.0
    """Bytes of the output."""
    scratch: float = 0.0
    """Bytes of temporary files, deleted at the end of the stage."""
    read: float = 0.0
    """Bytes read from storage."""
    fetched: float = 0.0
    """Bytes received from the internet."""
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    assumed: str = ""
    """What the estimate assumes of settings that the stage chooses itself."""


@dataclass(frozen=True)
class Cost:
    """Hours and price of a need on given machines."""

    need: StageNeed
    machines: str
    """Name of the machines in the input file."""
    hours: float
    """Wall time, if CPU, GPU and network work in parallel."""
    bound: str
    """The bottleneck: CPU, GPU or network."""
    dollars: float


class DataSizes(NamedTuple):
    """Rows of each stage. edge: shorter edge of database images in pixels; dim: dimension of the vectors.

    source: of the number of database images.
    """

    metadata: int
    train: int
    database: int
    edge: int
    dim: int
    source: str = "assumed"

    @property
    def selected(self) -> int:
        """Rows to download: all, because the number that filter drops is not known beforehand."""
        return self.metadata

    @property
    def images(self) -> int:
        """Downloaded images."""
        return self.train + self.database


@dataclass(frozen=True)
class StageEstimates:
    """Needs of the data stages, from the rates of the input file. One method a stage."""

    inputs: Inputs
    data: DataSizes
    used: list[str] = field(default_factory=list)

    def filter(self) -> StageNeed:
        """Three passes over the metadata; two of them read it."""
        rows, text = self.data.metadata, self._rate("text")
        return self._need(
            "filter",
            kept=rows * text,
            scratch=rows * KEY_BYTES,
            read=2 * rows * self._rate("filter_read") + 2 * rows * KEY_BYTES,
            cpu_s=rows * self._rate("filter_cpu") * MICROSECOND,
        )

    def download(self) -> StageNeed:
        """Request every selected URL; store the images that arrive."""
        urls = {"train": self.data.train, "database": self.data.selected - self.data.train}
        return self._need(
            "download",
            kept=self.image_bytes() + self.data.selected * self._rate("text"),
            read=self.data.selected * self._rate("text"),
            fetched=sum(count * self._rate(f"fetch_bytes_{split}") for split, count in urls.items()),
            cpu_s=sum(count * self._rate(f"fetch_cpu_{split}") for split, count in urls.items()) * MICROSECOND,
        )

    def image_bytes(self) -> float:
        """Bytes of all stored images, database images scaled to their edge."""
        area = (self.data.edge / PUBLISHED_EDGE) ** 2
        database = self.data.database * self._rate("image_database") * area
        return database + self.data.train * self._rate("image_train")

    def embed(self) -> StageNeed:
        """Store a float16 vector and the metadata of each image."""
        images = {"train": self.data.train, "database": self.data.database}
        return self._need(
            "embed",
            kept=self.data.images * self._vector_bytes(),
            read=self.image_bytes(),
            cpu_s=sum(count * self._rate(f"decode_cpu_{split}") for split, count in images.items()) * MICROSECOND,
            gpu_s=self.data.images / self._rate("embed_gpu"),
        )

    def near_copies(self) -> StageNeed:
        """Compare the hashes of all database images with those of all training images, in groups of both."""
        groups = math.ceil(self.data.database / ROWS_PER_GROUP)
        return self._need(
            "near copies",
            kept=self.data.images * HASH_BYTES,
            read=(self.data.images + groups * self.data.train) * HASH_BYTES,
            cpu_s=self.data.database * self.data.train * self._rate("near_copy_pair") * PICOSECOND,
        )

    def index(self, config: IndexConfig) -> StageNeed:
        """Assign rows to partitions, shuffle them, index each partition."""
        rows, dim_ratio = self.data.database, self.data.dim / MEASURED_DIM
        products = 2.0 * rows * self.data.dim * config.num_partitions(rows) / self._rate("product_cpu")
        return self._need(
            "index",
            kept=rows * (dim_ratio * self._rate("index_bytes") + self._rate("text")),
            scratch=rows * self._vector_bytes(),
            read=2 * rows * self._vector_bytes(),
            cpu_s=rows * dim_ratio * self._rate("index_cpu") * MICROSECOND + products,
        )

    def neighbors(self, config: NeighborsConfig, index: IndexConfig) -> StageNeed:
        """Route training images to partitions, match, merge; measure recall on a sample; before that `min_recall`."""
        rows, queries, dim = self.data.database, self.data.train, self.data.dim
        partitions = index.num_partitions(rows)
        visits, assumed = self._visits(config, partitions)
        match_bytes = config.k * (FLOAT16_BYTES * dim + 16.0) + 16.0
        row_bytes = config.k * (FLOAT16_BYTES * dim + 16.0) + 8.0
        scratch = queries * visits * (FLOAT16_BYTES * dim + 8.0 + match_bytes)
        read = self.data.images * self._vector_bytes() + rows * FLOAT16_BYTES * dim * bool(config.min_recall)
        recall_flops = 2.0 * config.recall_sample * dim * rows
        exact_flops = 2.0 * queries * visits * dim * rows / partitions + recall_flops
        cpu_s = 2.0 * queries * dim * partitions / self._rate("product_cpu")
        gpu_s = 0.0
        if config.gpus_per_worker:
            compute_s = exact_flops / (self._rate("gpu_flops") * self._rate("match_share"))
            gpu_s = max(compute_s, (read + scratch) / self._rate("gpu_read"))
        elif config.lists_per_partition:
            recall_s = recall_flops / self._rate("product_cpu")
            lists = queries * visits * config.lists_per_partition * dim / MEASURED_DIM
            cpu_s += lists * self._rate("match_cpu") * MICROSECOND + recall_s
        else:
            cpu_s += exact_flops / self._rate("product_cpu")
        kept = queries * row_bytes
        amounts = {"kept": kept, "scratch": scratch, "read": read + scratch, "cpu_s": cpu_s, "gpu_s": gpu_s}
        return self._need("neighbors", assumed, **amounts)

    def _visits(self, config: NeighborsConfig, partitions: int) -> tuple[int, str]:
        """Partitions that a query visits, and where the number is from if the join chooses it."""
        if not config.min_recall:
            return min(config.partitions_per_query or partitions, partitions), ""
        if self.inputs.partitions is None:
            raise UserError("the inputs have no [partitions], which the plan of neighbors.min_recall needs.")
        measured = self.inputs.partitions
        fewest, share = measured.fewest(config.min_recall)
        visits = min(fewest, partitions)
        return visits, (
            f"neighbors.min_recall = {config.min_recall:g}: {visits} of {partitions:,} partitions a query are assumed,"
            f" with all their rows. Of {measured.partitions:,} partitions, {fewest} hold {share:.3f} of the true"
            f" neighbors ({measured.source}). The stage measures and chooses the number before the join."
        )

    def _vector_bytes(self) -> float:
        return FLOAT16_BYTES * self.data.dim + self._rate("text")

    def _rate(self, name: str) -> float:
        self.used.append(name)
        return self.inputs.rate(name)

    def _need(self, stage: str, assumed: str = "", **amounts: float) -> StageNeed:
        used = tuple(dict.fromkeys(self.used))
        self.used.clear()
        return StageNeed(stage, used, assumed=assumed, **amounts)


def cost(need: StageNeed, inputs: Inputs) -> Cost:
    """Hours and price of a stage that has its machines to itself."""
    name = "gpu" if need.gpu_s else "cpu"
    if name not in inputs.machines:
        raise UserError(f"the inputs have no [machines.{name}], which {need.stage} needs.")
    machines = inputs.machines[name]
    traffic = need.kept + need.scratch + need.read + need.fetched
    hours = {
        "CPU": need.cpu_s / (machines.count * machines.cpus) / 3600,
        "network": traffic * 8 / (machines.count * machines.gbit_s * 1e9) / 3600,
    }
    if need.gpu_s:
        hours["GPU"] = need.gpu_s / (machines.count * machines.gpus) / 3600
    bound = max(hours, key=lambda resource: hours[resource])
    return Cost(need, name, hours[bound], bound, hours[bound] * machines.count * machines.dollars_per_hour)


def used_rates(needs: list[StageNeed], inputs: Inputs) -> Iterator[tuple[str, Rate]]:
    """The rates in these needs, in the order of the input file."""
    used = {name for need in needs for name in need.rates}
    return ((name, rate) for name, rate in inputs.rates.items() if name in used)
