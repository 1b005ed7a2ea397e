"""What the data stages need at a given size: storage, bandwidth, CPU and GPU time, hours and money.

Reads nothing, writes nothing: arithmetic on a recipe's settings and on rates that an input file states with
their sources. Everything is linear in rows, but for the lists of centroids, whose length grows with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline.recipe import NeighborsConfig
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.recipe import IndexConfig

MICRO = 1e-6
PUBLISHED_EDGE = 384
"""Shorter edge in pixels of the database images whose size `rates.image_database` states."""
MEASURED_DIM = 768
"""Dimension of the vectors that `rates.index_*` and `rates.match_cpu` were measured with."""
HALF = 2
"""Bytes of a float16."""
KEY = 16.125
"""Bytes that the filter notes of a row between its passes (selection.KEYS)."""


class Rate(Config):
    """A number with its unit and where it is from."""

    value: float = Field(gt=0)
    """The number."""
    unit: str = Field(min_length=1)
    """Of what, by what."""
    source: str = Field(pattern="^(measured|published|assumed)")
    """Whether it was measured, published or assumed, and where."""


class Sizes(Config):
    """What a recipe does not say."""

    metadata_rows: PositiveInt
    """Rows of the metadata."""
    database_images: PositiveInt
    """Images of the database that arrive and stay."""
    training: tuple[str, ...] = Field(strict=False)
    """Recipes that train on the data, relative to the file."""


class Machines(Config):
    """Equal machines that a stage has to itself."""

    count: PositiveInt
    """Machines."""
    cpus: PositiveInt
    """CPUs of each."""
    gpus: NonNegativeInt
    """GPUs of each."""
    gbit_s: PositiveFloat
    """Network of each, in and out together, Gbit/s."""
    dollars_per_hour: float = Field(ge=0)
    """Price of each."""
    source: str = Field(min_length=1)
    """Where the price is from."""


class Prices(Config):
    """Prices beside those of machines."""

    storage_dollars_per_tb_month: float = Field(ge=0)
    """Of 10^12 bytes kept."""


class Check(Config):
    """A rate at several sizes: where it stays the same, the stage is linear."""

    what: str
    """The rate and its unit."""
    sizes: tuple[PositiveInt, ...] = Field(strict=False)
    """Rows."""
    values: tuple[PositiveFloat, ...] = Field(strict=False)
    """The rate at each of them."""

    @model_validator(mode="after")
    def _fits(self) -> "Check":
        if len(self.sizes) != len(self.values):
            raise ValueError(f"{len(self.sizes)} sizes but {len(self.values)} values")
        return self


class Inputs(Config):
    """The input file."""

    sizes: Sizes
    """How much there is."""
    rates: dict[str, Rate]
    """By name."""
    machines: dict[str, Machines]
    """`cpu` for stages without GPUs, `gpu` for the others."""
    prices: Prices
    """What else costs."""
    checks: tuple[Check, ...] = Field((), strict=False)
    """Measured at several sizes."""

    def rate(self, name: str) -> float:
        """The value of a rate. Raises UserError if the file does not state it."""
        if name not in self.rates:
            raise UserError(f"the inputs have no [rates.{name}]: give it a value, a unit and a source.")
        return self.rates[name].value


@dataclass(frozen=True)
class Need:
    """What a stage needs in all. Bytes, and seconds of one CPU or one GPU."""

    stage: str
    rates: tuple[str, ...]
    """Names of the rates it was reckoned with."""
    kept: float = 0.0
    """Bytes that stay on disk."""
    scratch: float = 0.0
    """Bytes written and deleted again when the stage is done."""
    read: float = 0.0
    """Bytes read from storage."""
    fetched: float = 0.0
    """Bytes that come from the internet."""
    cpu_s: float = 0.0
    gpu_s: float = 0.0


@dataclass(frozen=True)
class Cost:
    """A need on machines."""

    need: Need
    machines: str
    """Name of the machines."""
    hours: float
    """Wall clock, if CPU, GPU and network work side by side."""
    bound: str
    """What takes longest: CPU, GPU or network."""
    dollars: float


class Data(NamedTuple):
    """The sizes of everything between the stages. edge: pixels of a database image; dim, k: of vectors."""

    metadata: int
    train: int
    database: int
    edge: int
    dim: int

    @property
    def selected(self) -> int:
        """Rows that are fetched: all of them; what the filter drops is not known beforehand."""
        return self.metadata

    @property
    def images(self) -> int:
        """Images that arrive."""
        return self.train + self.database


@dataclass(frozen=True)
class Reckoning:
    """Needs of the data stages, one method each, from the input file's rates."""

    inputs: Inputs
    data: Data
    used: list[str] = field(default_factory=list)

    def filter(self) -> Need:
        """Three passes over the metadata, of which two read it."""
        rows, text = self.data.metadata, self._rate("text")
        return self._need(
            "filter",
            kept=rows * text,
            scratch=rows * KEY,
            read=2 * rows * self._rate("filter_read") + 2 * rows * KEY,
            cpu_s=rows * self._rate("filter_cpu") * MICRO,
        )

    def download(self) -> Need:
        """Every selected URL is asked, those of images to train on among them."""
        urls = {"train": self.data.train, "database": self.data.selected - self.data.train}
        return self._need(
            "download",
            kept=self.image_bytes() + self.data.selected * self._rate("text"),
            read=self.data.selected * self._rate("text"),
            fetched=sum(count * self._rate(f"fetch_bytes_{split}") for split, count in urls.items()),
            cpu_s=sum(count * self._rate(f"fetch_cpu_{split}") for split, count in urls.items()) * MICRO,
        )

    def image_bytes(self) -> float:
        """All images as stored: those of the database cut down to their edge."""
        area = (self.data.edge / PUBLISHED_EDGE) ** 2
        database = self.data.database * self._rate("image_database") * area
        return database + self.data.train * self._rate("image_train")

    def embed(self) -> Need:
        """A float16 vector for each image, beside what is shown of it."""
        images = {"train": self.data.train, "database": self.data.database}
        return self._need(
            "embed",
            kept=self.data.images * self._vector_bytes(),
            read=self.image_bytes(),
            cpu_s=sum(count * self._rate(f"decode_cpu_{split}") for split, count in images.items()) * MICRO,
            gpu_s=self.data.images / self._rate("embed_gpu"),
        )

    def index(self, config: IndexConfig) -> Need:
        """Assign each row to a partition, write all rows in that order, index each partition."""
        rows, wide = self.data.database, self.data.dim / MEASURED_DIM
        products = 2.0 * rows * self.data.dim * config.num_partitions(rows) / self._rate("product_cpu")
        return self._need(
            "index",
            kept=rows * (wide * self._rate("index_bytes") + self._rate("text")),
            scratch=rows * self._vector_bytes(),
            read=2 * rows * self._vector_bytes(),
            cpu_s=rows * wide * self._rate("index_cpu") * MICRO + products,
        )

    def neighbors(self, config: NeighborsConfig, index: IndexConfig) -> Need:
        """Route each training image to partitions, match there, merge; check the recall of a sample."""
        rows, queries, dim = self.data.database, self.data.train, self.data.dim
        partitions = index.num_partitions(rows)
        probes = min(config.partitions_per_query or partitions, partitions)
        found = config.k * (HALF * dim + 12.0) + 16.0
        row = config.k * (HALF * dim + 12.0) + 8.0
        scratch = queries * probes * (HALF * dim + 8.0 + found)
        read = self.data.images * self._vector_bytes() + rows * HALF * dim * bool(config.recall_sample)
        exact = 2.0 * queries * probes * dim * rows / partitions + 2.0 * config.recall_sample * dim * rows
        cpu_s = 2.0 * queries * dim * partitions / self._rate("product_cpu")
        gpu_s = 0.0
        if config.gpus_per_worker:
            computing = exact / (self._rate("gpu_flops") * self._rate("match_share"))
            gpu_s = max(computing, (read + scratch) / self._rate("gpu_read"))
        elif config.lists_per_partition:
            checked = 2.0 * config.recall_sample * dim * rows / self._rate("product_cpu")
            lists = queries * probes * config.lists_per_partition * dim / MEASURED_DIM
            cpu_s += lists * self._rate("match_cpu") * MICRO + checked
        else:
            cpu_s += exact / self._rate("product_cpu")
        return self._need(
            "neighbors", kept=queries * row, scratch=scratch, read=read + scratch, cpu_s=cpu_s, gpu_s=gpu_s
        )

    def _vector_bytes(self) -> float:
        return HALF * self.data.dim + self._rate("text")

    def _rate(self, name: str) -> float:
        self.used.append(name)
        return self.inputs.rate(name)

    def _need(self, stage: str, **amounts: float) -> Need:
        used = tuple(dict.fromkeys(self.used))
        self.used.clear()
        return Need(stage, used, **amounts)


def cost(need: Need, inputs: Inputs) -> Cost:
    """Hours and money of a stage that has its machines to itself."""
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
    bound = max(hours, key=lambda one: hours[one])
    return Cost(need, name, hours[bound], bound, hours[bound] * machines.count * machines.dollars_per_hour)


def sources(needs: list[Need], inputs: Inputs) -> Iterator[tuple[str, Rate]]:
    """The rates that were used, in the order of the input file."""
    used = {name for need in needs for name in need.rates}
    return ((name, rate) for name, rate in inputs.rates.items() if name in used)
