"""The settings of the paper's experiments: what `make paper` reads from a recipe beside `[evaluate]`."""

from pydantic import Field

from retrieval.config import Config


class PaperConfig(Config):
    """Which figures and how sure (section `paper`); k, guidance, steps, prompts and styles are evaluate's."""

    prompts: tuple[str, ...] = Field(default=(), strict=False)
    """Of the figures; empty: the first four of evaluate.prompts_file."""
    swap: tuple[str, ...] = Field(default=(), strict=False, max_length=2)
    """The two style databases of Fig. 2; empty: the first two of evaluate."""
    pictures_per_prompt: int = Field(default=4, ge=1)
    """Samples of each prompt on the sheets of Fig. 1 and 5."""
    retrieval_k: int = Field(default=20, ge=1)
    """Neighbors whose retrieval is timed."""
    retrieval_queries: int = Field(default=200, ge=2)
    """Prompts that are searched for, one by one, in each database."""
    loss_draws: int = Field(default=8, ge=4, multiple_of=4)
    """Timesteps, with noise, of each held-out image; every quartile gets as many."""
    training_images: int = Field(default=10_000, ge=2)
    """Most training images that samples are compared with, drawn by the seed."""
    style_pictures: str = ""
    """Folder of the style databases' pictures, in a folder for each style, by its name or its words; empty:
    samples are compared with these pictures by CLIP alone."""
    closest_pairs: int = Field(default=8, ge=1)
    """Samples shown beside what they are nearest to."""
    bootstrap_draws: int = Field(default=500, ge=100)
    """Resamplings behind each confidence interval."""
    seed: int = Field(default=0, ge=0)
    """Of controls, resamplings and choices; the samples' seeds are evaluate's."""
