"""Settings of sampling: section `sample` of a recipe, and the base class of all stages that sample.

Imports no torch, so that recipes are read and checked quickly.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from retrieval.config import Config, added_setting, runtime_setting
from retrieval.errors import UserError
from trainer.model.context import Mode
from trainer.model.recipe import SchedulerName
from trainer.sampling.request import FULL, TRAINING_DATABASE, Request, read_prompts, require_text


class ComputeConfig(Config):
    """Device, precision and parallelism of sampling."""

    device: str = runtime_setting("auto")
    """`cpu`, `cuda`, `cuda:1`; `auto` uses a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format inside the UNet; latents are always fp32."""
    compile: bool = runtime_setting(False)
    """Compile the UNet before its first call: takes a minute or more, pays off for many samples on a GPU. Contexts are
    padded to a multiple of 32 tokens, which attention ignores, so that other numbers of neighbors compile nothing."""
    batch_size: int = runtime_setting(16, ge=1)
    """Samples in one UNet call (twice as many rows with guidance)."""
    workers: int = runtime_setting(0, ge=0)
    """Batches computed in parallel threads; 0: one per CPU, at most 4, and 1 on a GPU."""
    threads: int = runtime_setting(0, ge=0)
    """CPU threads of torch for each worker; 0 divides the CPUs among the workers."""


class SamplingConfig(ComputeConfig):
    """Settings that the stages `sample` and `evaluate` share."""

    prompts_file: str = ""
    """UTF-8 text file, one prompt a line; empty lines and lines that start with # are skipped."""
    k: int = Field(default=19, ge=1)
    """Neighbors that condition a sample; may differ from the k of training."""
    guidance: float = Field(default=5.0, ge=0)
    """Scale s of classifier-free guidance; 1 is no guidance."""
    negative_prompt: str = added_setting("")
    """Text that guidance moves away from; empty: none."""
    guidance_interval: tuple[float, float] = added_setting(FULL, strict=False)
    """Guidance only at noise levels t / (T - 1) between two numbers, such as [0.2, 0.8] (Kynkäänniemi et al. 2024)."""
    neighbor_weight: float = added_setting(1.0, gt=0)
    """Factor on the weight of all neighbors in attention: below 1, prompt and images count more."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """`ddim`, `plms`, `dpm++`, `euler`, `euler_karras` or `unipc`."""
    height: int = Field(default=0, ge=0)
    """Height of a picture in pixels: a multiple of the autoencoder's factor times the UNet's downsampling;
    0 for the training size."""
    width: int = Field(default=0, ge=0)
    """Width of a picture in pixels; as `height`."""
    seed: int = Field(default=0, ge=0)
    """Base seed: all seeds of the stage are derived from it."""

    def request(self, prompt: str, seed: int, mode: Mode, database: str) -> Request:
        """A request with this stage's k, guidance, steps, scheduler and size."""
        return Request(
            prompt=prompt,
            seed=seed,
            mode=mode,
            database="" if mode == "text" else database,
            k=self.k,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            guidance_interval=self.guidance_interval,
            neighbor_weight=self.neighbor_weight,
            steps=self.steps,
            scheduler=self.scheduler,
            height=self.height,
            width=self.width,
        )


DEMO_CERTIFICATE = "demo"
"""Value of `certificate` for a new key that no authority confirms."""


class SampleConfig(SamplingConfig):
    """Section `sample` of a recipe."""

    prompts: tuple[str, ...] = Field(default=(), strict=False)
    """Prompts; those of `prompts_file` follow."""
    databases: tuple[str, ...] = Field(default=(TRAINING_DATABASE,), strict=False, min_length=1)
    """Names below `databases/`, each a column of the grid; `index` is the training database."""
    mode: Mode = "text_and_neighbors"
    """Conditioning: prompt and neighbors; only neighbors; only the prompt; or, in mode `unconditional`,
    neighbors of an image drawn from the training database."""
    mix: dict[str, float] = Field(default={})
    """Databases with weights above 0: replaces `databases` by one column with neighbors of all of them."""
    images: tuple[str, ...] = Field(default=(), strict=False)
    """Image files that condition every sample, with or without a prompt."""
    init_image: str = added_setting("")
    """Image file that every sample starts from instead of noise, scaled and cropped to the size of a sample."""
    strength: float = added_setting(0.75, ge=0, le=1)
    """Share of the steps that change `init_image`: 0 returns it as the autoencoder decodes it, 1 keeps nothing."""
    mask: str = added_setting("")
    """Image file of the size of `init_image`, white where it is drawn again, else black or transparent; empty: white
    everywhere."""
    exclude: tuple[int, ...] = Field(default=(), strict=False)
    """Image ids that are not used as neighbors; the next best replace them."""
    without: str = added_setting("")
    """Condition on the metadata, such as `artist == 'Ann'`: rows that meet it are not used as neighbors; empty:
    none."""
    weights: dict[int, float] = Field(default={})
    """Factors on the attention weight of neighbors, by image id; 0 removes a neighbor."""
    top_m: float = Field(default=1.0, gt=0, le=1)
    """Mode `unconditional`: share of the most retrieved images to draw a query from."""
    certificate: str = runtime_setting("")
    """PEM file of the certificates that sign the pictures (C2PA), the signer's first; `demo`: a new key for
    each process, with a certificate that no known authority issued; empty: no signature."""
    private_key: str = runtime_setting("")
    """PEM file of the key of the first certificate."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Pictures per prompt and database; picture n has seed + n for all prompts and databases."""

    def all_prompts(self) -> tuple[str, ...]:
        """The prompts of the recipe, then those of the file. Raises UserError if the mode needs one."""
        for prompt in filter(None, self.prompts):
            require_text(prompt)
        prompts = self.prompts + (read_prompts(self.prompts_file) if self.prompts_file else ())
        if not prompts and not self.images and self.mode != "unconditional":
            raise UserError("[sample] has no prompt. Set prompts or prompts_file.")
        return prompts or ("",)

    def columns(self) -> tuple[str, ...]:
        """Folders of the pictures: the databases, `mix`, or `text` if no database is searched."""
        if self.mode == "text":
            return ("text",)
        return ("mix",) if self.mix else tuple(dict.fromkeys(self.databases))

    def searched_databases(self) -> tuple[str, ...]:
        """The databases that are searched for neighbors."""
        if self.mode == "text":
            return ()
        return tuple(self.mix) or self.columns()

    def request_for(self, prompt: str, seed: int, column: str) -> Request:
        """The request for a picture of a column, without the content of image files."""
        return replace(
            self.request(prompt, seed, self.mode, "" if self.mix else column),
            mix=() if self.mode == "text" else tuple(self.mix.items()),
            exclude=self.exclude,
            without=self.without,
            weights=tuple(self.weights.items()),
            top_m=self.top_m,
            strength=self.strength if self.init_image or "strength" in self.model_fields_set else 1.0,
        )
