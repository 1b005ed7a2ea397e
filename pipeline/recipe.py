"""The settings of the data stages: sections `filter`, `download`, `embed`, `optout` and `neighbors` of a recipe.

Imports no torch, Ray or faiss, so reading and checking settings is fast.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retrieval.config import Config, ResourcesConfig, WorkersConfig, runtime_setting
from retrieval.perceptual_hash import MAX_DISTANCE
from retrieval.pictures.budget import MAX_PIXELS
from retrieval.recipe import HeadConfig, JoinConfig, Precision

MetadataFormatName = Literal["laion", "relaion", "datacomp", "coyo", "cc3m", "cc12m", "wit"]
Missing = Literal["drop", "keep"]
ImageFormat = Literal["jpeg", "webp"]
HeadName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Columns(Config):
    """Column names in the metadata, in any case. Empty: the names of `metadata_format`."""

    url: str = ""
    """URL of the image."""
    caption: str = ""
    """Caption of the image; `TEXT` in LAION."""
    width: str = ""
    """Width in pixels. The first release of laion2B-en swapped width and height: swap these names there."""
    height: str = ""
    """Height in pixels."""
    similarity: str = ""
    """CLIP similarity of image and text; optional."""
    pwatermark: str = ""
    """Probability of a watermark, 0 to 1."""
    punsafe: str = ""
    """Probability of unsafe content, 0 to 1."""
    aesthetic: str = ""
    """Aesthetic score; optional."""
    language: str = ""
    """Language of the caption, such as `en`; optional."""
    license: str = ""
    """Licence; optional."""
    md5: str = ""
    """MD5 of the picture's file in hex. `download` refuses other bytes as `checksum_mismatch`. Empty: none, in every
    format, because metadata call other things `md5` or `hash`, such as hashes of URL and caption."""
    sha256: str = ""
    """SHA-256 of the picture's file in hex, as `md5`; used rather than that if a row has both. Pictures that are stored
    already are not checked."""
    face_boxes: str = runtime_setting("")
    """Boxes of faces, a list of [left, top, right, bottom] as shares of the picture's edges, or the same as JSON.
    `download` blurs them; if they change, the pictures are fetched again. DataComp's `face_bboxes` is the default."""


class FilterConfig(WorkersConfig):
    """Which metadata is read and which rows are kept (section `filter` of a recipe)."""

    metadata: str = runtime_setting(..., min_length=1)
    """File, or folder with subfolders, of the metadata: Parquet, CSV, TSV or JSON lines; a path or a URL."""
    files: str = runtime_setting("", pattern=r"^([0-9]+-[0-9]+)?$")
    """Range of the metadata's files that are read, in the order of their names, such as `0-99`; empty: all."""
    sample: float = Field(1.0, gt=0, le=1)
    """Share of the URLs that are used, selected by `seed` and a hash of each URL. A smaller sample is part of a larger
    one, and the division of the metadata into files has no effect."""
    metadata_format: MetadataFormatName = "laion"
    """Data set whose column names are expected."""
    columns: Columns = Columns()
    """Column names that differ from those of `metadata_format`."""
    min_edge: int = Field(768, ge=1)
    """Least shorter edge in pixels of a training image; 768 for the paper's LAION model."""
    max_watermark: float = Field(0.8, ge=0)
    """Rows below this `pwatermark` can be for training; the others go to the database. Of several rows with one URL the
    highest counts."""
    max_unsafe: float = Field(0.5, ge=0)
    """Rows at or above this `punsafe` are dropped, and all other rows with their URL."""
    missing_watermark: Missing = "drop"
    """Rows without pwatermark: drop them as `no_score`, or keep them as if there was no watermark. With "drop" a
    file without this column is an error; this holds for all three settings."""
    missing_safety: Missing = "drop"
    """Rows without punsafe: drop them as `no_score`, or keep them as if they were safe."""
    missing_size: Missing = "drop"
    """Rows without width or height: drop them as `bad_size`, or keep them; then `download` checks the sizes."""
    min_similarity: float = Field(0.0, ge=0, le=1)
    """Rows below this CLIP similarity of image and text are dropped; 0: no limit. This threshold and the next five hold
    for both splits. They drop rows without the value, and a file without the column is an error."""
    min_aesthetic: float = Field(0.0, ge=0)
    """Rows below this aesthetic score are dropped; 0: no limit."""
    languages: tuple[str, ...] = Field((), strict=False)
    """Rows of other languages are dropped; empty: all languages. As in the metadata, such as `en`; in any case."""
    max_aspect_ratio: float = Field(0.0, ge=0)
    """Rows with a greater ratio of longer to shorter edge are dropped; 0: no limit."""
    min_caption_chars: int = Field(0, ge=0)
    """Rows with a shorter caption, in characters, are dropped."""
    max_caption_chars: int = Field(0, ge=0)
    """Rows with a longer caption, in characters, are dropped; 0: no limit."""
    max_train: int = Field(0, ge=0)
    """Most rows for training; the others go to the database; 0: no limit."""
    seed: int = Field(0, ge=0)
    """Selects the rows of `sample` and, if there are more than `max_train`, those for training, by their image id."""
    blocklist: str = runtime_setting("")
    """Path or URL of the blocklist, a text file of URLs, domains and image ids; empty: none. If its entries change,
    newly listed rows of a finished stage are dropped. Rows that its first list dropped stay dropped."""
    rows_per_shard: int = Field(10_000, ge=1)
    """Rows in an output shard; the last shard of a piece can have fewer."""
    rows_per_piece: int = Field(2_000_000, ge=1, le=1 << 30)
    """Most input rows of a task; larger Parquet files are divided at their row groups, text files are not."""

    @model_validator(mode="after")
    def _can_be_met(self) -> "FilterConfig":
        if 0 < self.max_aspect_ratio < 1 or 0 < self.max_caption_chars < self.min_caption_chars:
            raise ValueError(
                "max_aspect_ratio must be 0 or at least 1, and max_caption_chars 0 or at least min_caption_chars; got "
                f"{self.max_aspect_ratio}, {self.max_caption_chars} and {self.min_caption_chars}"
            )
        return self


SHARDS_AT_ONCE = 2
"""Shards that a worker of `download` works on at the same time."""


class DownloadConfig(WorkersConfig):
    """How images are fetched and stored (section `download` of a recipe).

    Only the edges are part of the fingerprint. The other settings apply to new requests and delete no finished shard.
    """

    contact: str = runtime_setting(..., pattern=r"^[!-~]+$")
    """URL or mail address for complaints of server owners, sent with every request."""
    user_agent: str = runtime_setting("laion-rdm", pattern=r"^[A-Za-z0-9._-]+$")
    """Product name in the User-Agent header; X-Robots-Tag and robots.txt can address it."""
    robots: bool = runtime_setting(False)
    """Whether to request and obey robots.txt and tdmrep.json. Preferences in response headers are always obeyed."""
    allow_private: Literal["none", "loopback", "all"] = runtime_setting("none")
    """Allowed addresses besides public ones: none, loopback, or all private networks."""
    ports: tuple[Annotated[int, Field(ge=1, lt=1 << 16)], ...] = runtime_setting((80, 443, 8080, 8443), strict=False)
    """Ports that may be contacted at public addresses. Other allowed addresses may use any port."""
    timeout_s: float = runtime_setting(10.0, gt=0)
    """Longest wait for the next data of a server, in seconds."""
    deadline_s: float = runtime_setting(60.0, gt=0)
    """Longest time for one URL with its redirects and retries, in seconds."""
    retries: int = runtime_setting(2, ge=0)
    """Retries after a 429, 500, 502, 503, 504 or a broken connection."""
    max_bytes: int = runtime_setting(32 << 20, ge=1)
    """Largest response body in bytes."""
    max_pixels: int = runtime_setting(80_000_000, ge=1, le=MAX_PIXELS)
    """Most pixels of a picture that is decoded, at most 134 million. WebP and AVIF take 20 bytes of memory a pixel and
    end at 100 million."""
    train_edge: int = Field(1024, ge=0)
    """Shorter edge in pixels that larger training images are scaled down to; 0: all keep their size."""
    train_min_edge: int = Field(768, ge=1)
    """Least shorter edge in pixels of a decoded training image."""
    database_edge: int = Field(224, ge=1)
    """Shorter edge in pixels that larger database images are scaled down to."""
    database_min_edge: int = Field(32, ge=1)
    """Least shorter edge in pixels of a database image; some servers send 1 x 1 for missing pictures."""
    image_format: ImageFormat = runtime_setting("jpeg")
    """Format of stored pictures. WebP files are smaller, but decode slowly and never at reduced size. Upright sRGB
    pictures of this format that keep their size keep their compressed pixels, a WebP only if it has no metadata."""
    jpeg_quality: int = runtime_setting(95, ge=1, le=100)
    """Quality of pictures that are encoded as JPEG."""
    webp_quality: int = runtime_setting(90, ge=1, le=100)
    """Quality of pictures that are encoded as WebP, with losses also at 100."""
    max_aspect_ratio: float = runtime_setting(0.0, ge=0)
    """Decoded images with a greater ratio of longer to shorter edge are refused as `aspect_ratio`; 0: no limit."""
    blocklist: str = runtime_setting("")
    """Path or URL of the blocklist, as in `filter`; entries with hashes apply only here. If its entries change, listed
    images are removed from finished shards, and images no longer listed wait for `--retry`."""
    min_answered: float = runtime_setting(0.05, ge=0, le=1)
    """Share of a shard's URLs that must be answered, with any status; below it the network counts as down."""
    threads: int = runtime_setting(192, ge=1)
    """URLs of a shard that are fetched at once. A worker downloads two shards at once: 384 requests, of which a part
    waits for the decoders when the answers of slow servers come together."""
    host_connections: int = runtime_setting(3, ge=1)
    """Most connections to a host for each shard that is being downloaded."""
    max_host_connections: int = runtime_setting(32, ge=1)
    """Most connections to a host for all shards together that have more than `host_connections` URLs of it."""
    host_pause_s: float = runtime_setting(0.0, ge=0)
    """Least seconds between two requests to a host: for all those shards together, and for each other shard."""
    host_max_wait_s: float = runtime_setting(60.0, ge=0)
    """Longest total pause of a host in a shard, requested by its 429 and 503; then its other URLs are skipped."""

    @model_validator(mode="after")
    def _large_enough(self) -> "DownloadConfig":
        if 0 < self.train_edge < self.train_min_edge or self.database_edge < self.database_min_edge:
            raise ValueError(
                "train_edge must be 0 or at least train_min_edge, and database_edge at least database_min_edge; got "
                f"{self.train_edge} and {self.train_min_edge}, {self.database_edge} and {self.database_min_edge}"
            )
        if 0 < self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be 0 or at least 1, got {self.max_aspect_ratio}")
        return self


class ImportConfig(Config):
    """How imported pictures are divided (section `import` of a recipe). `[download]` says how they are stored."""

    database_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the pictures for the database, chosen by their image id; the others are for training. Unused with a
    database source."""
    seed: int = Field(default=0, ge=0)
    """Selects the pictures of the database."""
    rows_per_shard: int = Field(default=1000, ge=1)
    """Pictures in a shard; the last shard of a split can have fewer."""


class PatchesConfig(Config):
    """Patches of database pictures as rows (section `embed.patches`; paper appendix: ImageNet)."""

    max_patches: int = Field(default=0, ge=0)
    """Most patches of all pictures together; 0: whole pictures instead of patches."""
    min_per_picture: int = Field(default=2, ge=1)
    """Fewest patches of a picture; less, but at least one, where max_patches requires it."""
    max_per_picture: int = Field(default=3, ge=1)
    """Most patches of a picture."""
    shorter_side: int = Field(default=1200, ge=1)
    """Length in pixels that the shorter side is scaled to before patches are cropped."""
    edge: int = Field(default=256, ge=1)
    """Edge of a patch in pixels after scaling."""
    seed: int = Field(default=0, ge=0)
    """Seed of the number of patches of a picture and of their positions."""

    @model_validator(mode="after")
    def _ordered(self) -> "PatchesConfig":
        if self.min_per_picture > self.max_per_picture or self.edge > self.shorter_side:
            raise ValueError(
                "min_per_picture must be at most max_per_picture, and edge at most shorter_side; got "
                f"{self.min_per_picture} and {self.max_per_picture}, {self.edge} and {self.shorter_side}"
            )
        return self


class EmbedConfig(WorkersConfig):
    """How images are embedded and copies of training images are found (section `embed`)."""

    near_copy_bits: int = Field(default=6, ge=0, le=MAX_DISTANCE)
    """Database images within this Hamming distance of a training image or its mirror are near copies."""
    near_copies: ResourcesConfig = runtime_setting(ResourcesConfig())
    """`workers`, `nodes` and `memory_gb` of the search for copies, which takes one CPU a worker and no GPU. Empty:
    those of the stage."""
    patches: PatchesConfig = PatchesConfig()
    """Patches instead of whole database pictures."""
    heads: dict[HeadName, HeadConfig] = runtime_setting({})
    """Networks on the CLIP vectors, by name. Each adds a column `score_<name>` to the tables and can leave out
    pictures. If they change, finished shards are updated and CLIP is not computed again, unless all are removed."""
    precision: Precision = "bf16"
    """Of the encoder's matrix products on GPUs. CPUs compute in fp32, whose vectors belong to another fingerprint than
    those in bf16."""
    batch_size: int = runtime_setting(64, ge=1)
    """Images in a batch of the encoder."""
    compile: bool = runtime_setting(False)
    """Compile the encoder with torch.compile for batches of batch_size pictures: for GPUs, after minutes of compilation
    at each start of a worker. Vectors differ by rounding."""
    decode_threads: int = runtime_setting(2, ge=1)
    """Threads that decode and resize images."""
    gpus_per_worker: float = runtime_setting(0.0, ge=0)
    """GPUs of a worker; 0: CPU."""

    @property
    def used_precision(self) -> Precision:
        """`precision`, or fp32 on CPUs."""
        return self.precision if self.gpus_per_worker else "fp32"

    @property
    def near_copy_resources(self) -> ResourcesConfig:
        """Those of the search for copies."""
        return self if self.near_copies == ResourcesConfig() else self.near_copies


class OptoutConfig(ResourcesConfig):
    """The workers of `optout`, one CPU each (section `optout` of a recipe)."""


class NeighborsConfig(WorkersConfig):
    """The number of neighbors and the effort of the join (section `neighbors` of a recipe)."""

    k: int = Field(8, ge=1)
    """Neighbors per training image (8 in the paper's LAION model, 4 in its ImageNet model)."""
    near_copy_similarity: float = Field(0.96, gt=0, le=1)
    """Database images at least this similar to the training image are near copies and left out."""
    min_recall: float = Field(0.0, ge=0, lt=1)
    """Recall that the join must reach: it first measures on a sample of training images how many partitions and lists
    that takes. 0: partitions_per_query and lists_per_partition decide."""
    partitions_per_query: int = Field(0, ge=0)
    """Partitions that each training image is compared with; 0: all."""
    lists_per_partition: int = Field(0, ge=0)
    """Inverted lists that it visits in each partition; 0: all rows. Both 0: exact neighbors."""
    recall_sample: int = Field(1000, ge=0)
    """Training images in the measurement of recall against brute force; 0: no measurement."""
    seed: int = Field(0, ge=0)
    """Seed of that sample."""
    gpus_per_worker: float = runtime_setting(0.0, ge=0)
    """GPUs of a worker; 0: CPU."""

    @model_validator(mode="after")
    def _one_effort(self) -> "NeighborsConfig":
        if self.min_recall and (self.partitions_per_query or self.lists_per_partition):
            raise ValueError("min_recall chooses partitions_per_query and lists_per_partition. Set it or these")
        return self

    def join_config(self) -> JoinConfig:
        """The settings of the join."""
        return JoinConfig(
            k=self.k,
            near_copy_similarity=self.near_copy_similarity,
            partitions_per_query=self.partitions_per_query,
            lists_per_partition=self.lists_per_partition,
        )

    @property
    def device(self) -> str:
        """Torch device of the join."""
        return "cuda" if self.gpus_per_worker else "cpu"
