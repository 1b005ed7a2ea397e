"""What is asked of the sampler and what it gives back, as plain values.

Reads a prompts file; everything else is a record: a request, a neighbor, a finished sample with the
recipe that makes it again, and the settings that `sample` and `evaluate` share.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from retrieval.config import Config, speed
from retrieval.errors import UserError
from retrieval.storage import Root
from trainer.context import Mode
from trainer.sampler import SchedulerName

TRAINING_DATABASE = "index"
MAX_SEED = 2**32 - 1
"""torch's CPU generator heeds 32 bits of a seed: above, pictures would come again."""


class Compute(Config):
    """Where and how samples are computed."""

    device: str = speed("auto")
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format inside the UNet; the latents are fp32 in both."""
    compile: bool = speed(False)
    """Compile the UNet before its first call: a minute or more, worth it for many samples on a GPU."""
    batch_size: int = speed(16, ge=1)
    """Samples in one UNet call (twice as many rows with guidance)."""
    workers: int = speed(0, ge=0)
    """Batches computed side by side, each in a thread; 0 for one per CPU up to 4, or one on a GPU."""
    threads: int = speed(0, ge=0)
    """CPU threads of each worker inside torch; 0 shares the CPUs out among the workers."""


class SamplingConfig(Compute):
    """What a stage that samples needs to know."""

    prompts_file: str = ""
    """UTF-8 text, one prompt a line; empty lines and lines that start with # are left out."""
    k: int = Field(default=19, ge=1)
    """Neighbors that condition a sample; need not be the k of training."""
    guidance: float = Field(default=5.0, ge=0)
    """Scale s of classifier-free guidance; 1 is none."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """`ddim`, `plms` or `dpm++`, which does in 20 steps what the others do in 50."""
    height: int = Field(default=0, ge=0)
    """Of a picture in pixels: a multiple of the autoencoder's factor times the UNet's downsampling; 0 for
    the size of training."""
    width: int = Field(default=0, ge=0)
    """As `height`."""
    seed: int = Field(default=0, ge=0)
    """Where all seeds of the stage come from."""

    def request(self, prompt: str, seed: int, mode: Mode, database: str) -> "Request":
        """A request with this stage's k, guidance, steps, scheduler and size."""
        return Request(
            prompt=prompt,
            seed=seed,
            mode=mode,
            database="" if mode == "text" else database,
            k=self.k,
            guidance=self.guidance,
            steps=self.steps,
            scheduler=self.scheduler,
            height=self.height,
            width=self.width,
        )


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    """Any text: the query for neighbors and, unless the mode is `neighbors`, a token of the context."""
    seed: int = 0
    """Of the initial noise, 0 .. MAX_SEED; it means the same picture in every batch."""
    mode: Mode = "text_and_neighbors"
    """What the UNet is told."""
    database: str = TRAINING_DATABASE
    """A name below `databases/`, or `index` for the training database; not read in mode `text`."""
    k: int = 19
    """Neighbors to retrieve."""
    guidance: float = 5.0
    """Scale s of classifier-free guidance."""
    steps: int = 50
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """`ddim`, `plms` or `dpm++`."""
    height: int = 0
    """Of the picture in pixels; 0 for the size of training."""
    width: int = 0
    """As `height`."""


@dataclass(frozen=True)
class Neighbor:
    """A database image that conditioned a sample."""

    image_id: int
    similarity: float
    """Inner product with the query, -1..1."""
    url: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """A finished picture with all that made it."""

    request: Request
    picture: Image.Image
    neighbors: tuple[Neighbor, ...]
    """Best first; empty in mode `text`."""
    model: dict[str, str]
    """Checksums of the parts: `model`, `encoder`, `autoencoder`, and the `precision`."""

    def recipe(self) -> dict[str, Any]:
        """Everything that makes this picture again, ready for JSON; neighbors as [id, similarity]."""
        return {
            **asdict(self.request),
            **self.model,
            "neighbors": [[found.image_id, found.similarity] for found in self.neighbors],
        }

    def provenance(self) -> dict[str, Any]:
        """The recipe with the neighbors spelled out: ids, similarities, URLs and captions."""
        return {**self.recipe(), "neighbors": [asdict(found) for found in self.neighbors]}


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, in order. Raises UserError if it is missing or has none."""
    folder, _, file_name = name.rpartition("/")
    root = Root(folder or ".")
    if not root.exists(file_name):
        raise UserError(f"prompts_file = {name!r} is not there. Wanted: a text file with one prompt a line.")
    with root.open(file_name) as file:
        data = file.read()
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file = {name!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UserError(f"prompts_file = {name!r} has no prompt. Wanted: one prompt a line.")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """Identity of a list of prompts: 16 hex digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
