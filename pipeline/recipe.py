"""The settings of the data stages: sections `filter`, `download`, `embed` and `neighbors` of a recipe.

No torch, Ray or faiss is imported here: who reads or checks settings need not wait for them.
"""

from typing import Literal

from pydantic import Field, model_validator

from retrieval.config import Config, WorkersConfig, speed
from retrieval.perceptual_hash import MAX_DISTANCE
from retrieval.recipe import JoinConfig


class Columns(Config):
    """Names of the columns in the metadata, upper and lower case alike. Empty: the names LAION uses."""

    url: str = ""
    """Address of the image."""
    caption: str = ""
    """Text beside the image; `TEXT` in LAION."""
    width: str = ""
    """Width in pixels. The first release of laion2B-en swapped width and height: map them crosswise there."""
    height: str = ""
    """Height in pixels."""
    similarity: str = ""
    """CLIP similarity of image and text, kept as it is; may be absent."""
    pwatermark: str = ""
    """Probability of a watermark, 0 to 1."""
    punsafe: str = ""
    """Probability of unsafe content, 0 to 1."""
    license: str = ""
    """Licence; may be absent."""


class FilterConfig(WorkersConfig):
    """What is read and what is kept (section `filter` of a recipe)."""

    metadata: str = Field(min_length=1)
    """Folder or URL of the metadata's Parquet files, searched with its subfolders."""
    columns: Columns = Columns()
    """Names of the columns, where they are not LAION's."""
    min_edge: int = Field(768, ge=1)
    """Shorter edge in pixels from which an image may train; the paper's LAION model takes 768."""
    max_watermark: float = Field(0.8, ge=0)
    """A row trains only below this `pwatermark`; at or above it goes to the database."""
    max_unsafe: float = Field(0.5, ge=0)
    """A row is kept only below this `punsafe`."""
    missing_scores: Literal["drop", "keep"] = "drop"
    """Rows without pwatermark or punsafe: dropped as `no_score`, or kept as if the score were 0."""
    max_train: int = Field(0, ge=0)
    """Most rows for training, the others go to the database; 0: no limit."""
    seed: int = Field(0, ge=0)
    """Decides, with the image id alone, which rows train when there are more than `max_train`."""
    blocklist: str = ""
    """Path or URL of a text file of URLs, domains and image ids that must not be used; empty: none."""
    rows_per_shard: int = Field(10_000, ge=1)
    """Rows in an output shard; the last one of each piece holds fewer."""
    rows_per_piece: int = Field(2_000_000, ge=1, le=1 << 30)
    """Input rows that one task handles; a file with more is divided between its row groups."""


class DownloadConfig(WorkersConfig):
    """How images are fetched and stored (section `download` of a recipe)."""

    contact: str = speed(..., pattern=r"^[!-~]+$")
    """Where the owner of a server can complain: a URL or mail address, sent with every request."""
    user_agent: str = Field("laion-rdm", pattern=r"^[A-Za-z0-9._-]+$")
    """The name that servers see, and by which X-Robots-Tag may forbid us an image."""
    robots: bool = False
    """Whether each server's robots.txt is asked for and heeded; X-Robots-Tag always is."""
    allow_private: Literal["none", "loopback", "all"] = "none"
    """Addresses beside public ones: none, this machine alone, or private networks too."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wait for a server's next sign of life, in seconds."""
    deadline_s: float = Field(60.0, gt=0)
    """Longest time for one URL with its redirects and retries, in seconds."""
    retries: int = Field(2, ge=0)
    """Further attempts after a 429, 500, 502, 503, 504 or a broken connection."""
    max_bytes: int = Field(32 << 20, ge=1)
    """Largest body that is read, in bytes."""
    max_pixels: int = Field(80_000_000, ge=1, le=1 << 30)
    """Largest picture that is decoded: width x height."""
    train_min_edge: int = Field(768, ge=1)
    """Shorter edge in pixels that a training image must have once it is decoded."""
    database_edge: int = Field(224, ge=1)
    """Shorter edge in pixels to which larger database images are cut down, ratio kept."""
    database_min_edge: int = Field(32, ge=1)
    """Shorter edge in pixels of the least database image; servers send 1 x 1 for what they have not."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of pictures that are encoded anew; an upright RGB JPEG that keeps its size keeps its bytes."""
    blocklist: str = ""
    """Path or URL of a text file of what must not be used, as of filter; its hashes count here alone."""
    min_success: float = speed(0.05, ge=0, le=1)
    """Share of a shard's URLs that must give an answer of any kind; with less the network counts as down."""
    threads: int = speed(32, ge=1)
    """URLs that one worker fetches at once."""
    host_connections: int = speed(6, ge=1)
    """Most connections that one worker has to one host; further workers add theirs."""
    host_pause_s: float = speed(0.0, ge=0)
    """Least seconds between two requests of one worker to one host."""
    host_patience_s: float = speed(60.0, ge=0)
    """Seconds that a host may ask us to wait (429, 503) in one shard; then the rest of its URLs is left."""


class PatchesConfig(Config):
    """Which parts of database pictures are rows (section `embed.patches`; paper appendix: ImageNet)."""

    max_patches: int = Field(default=0, ge=0)
    """Most patches of all pictures together; 0: whole pictures instead of patches."""
    fewest: int = Field(default=2, ge=1)
    """Patches that a picture gives at least, while there are not too many; always one."""
    most: int = Field(default=3, ge=1)
    """Patches that a picture gives at most."""
    shorter_side: int = Field(default=1200, ge=1)
    """Length in pixels to which the shorter side is scaled before crops are taken."""
    edge: int = Field(default=256, ge=1)
    """Edge of a patch in pixels, after that scaling."""
    seed: int = Field(default=0, ge=0)
    """Decides how many patches a picture gives and where they lie."""

    @model_validator(mode="after")
    def _ordered(self) -> "PatchesConfig":
        if self.fewest > self.most or self.edge > self.shorter_side:
            raise ValueError(
                f"wanted fewest <= most and edge <= shorter_side, got {self.fewest} and {self.most}, "
                f"{self.edge} and {self.shorter_side}"
            )
        return self


class EmbedConfig(WorkersConfig):
    """How images are embedded, which of the database's are copies of training images (section `embed`)."""

    near_copy_bits: int = Field(default=6, ge=0, le=MAX_DISTANCE)
    """Bits of 64 in which the look of a database image may differ from a training image's or its mirror's."""
    patches: PatchesConfig = PatchesConfig()
    """Parts of the database's pictures that are rows of their own."""
    batch_size: int = speed(64, ge=1)
    """Images in one pass of the encoder."""
    decode_threads: int = speed(2, ge=1)
    """Threads that decode and resize ahead of the encoder."""
    gpus_per_worker: float = speed(0.0, ge=0)
    """GPUs each encoder takes."""


class NeighborsConfig(WorkersConfig):
    """How many neighbors, and how hard they are looked for (section `neighbors` of a recipe)."""

    k: int = Field(8, ge=1)
    """Neighbors per training image (8 in the paper's LAION model, 4 in its ImageNet model)."""
    near_copy_similarity: float = Field(0.96, gt=0, le=1)
    """A database image at least this similar to the training image is a copy of it, not a neighbor."""
    partitions_per_query: int = Field(0, ge=0)
    """Partitions each training image visits; 0 visits all."""
    lists_per_partition: int = Field(0, ge=0)
    """Inverted lists it visits in each; 0 compares all rows of the partition, with all partitions exactly."""
    recall_sample: int = Field(1000, ge=0)
    """Training images whose neighbors are checked against brute force over the whole database."""
    seed: int = 0
    """Seed of that sample."""
    gpus_per_worker: float = speed(0.0, ge=0)
    """GPUs each worker takes; 0 joins on CPUs."""

    def join_config(self) -> JoinConfig:
        """The join that these settings ask for."""
        return JoinConfig(
            k=self.k,
            near_copy_similarity=self.near_copy_similarity,
            partitions_per_query=self.partitions_per_query,
            lists_per_partition=self.lists_per_partition,
        )

    @property
    def device(self) -> str:
        """Where the join runs."""
        return "cuda" if self.gpus_per_worker else "cpu"
