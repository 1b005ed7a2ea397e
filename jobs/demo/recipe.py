"""The settings that only the demo has: `world`, `clip_training`, `autoencoder_training`, `judge_training`.

Imports no heavy library, because every command that reads a demo recipe imports this.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from retrieval.config import Config, added_setting, runtime_setting

GROUP_SIZE = 4
"""Scenes of a batch with equal style, color and background: they differ only in shape, count and layout."""


class WorldConfig(Config):
    """The size of the demo world and the port of its server (section `world` of a recipe)."""

    seed: int = Field(default=0, ge=0)
    """Seed of all pictures and rows."""
    port: int = Field(default=28_123, ge=1, le=65_535)
    """TCP port of the server on localhost, part of every URL. The default is below the ephemeral ports."""
    num_database: int = Field(default=5000, ge=1)
    """Ordinary rows with pictures of database size, both edges 224 to 320 px."""
    num_train: int = Field(default=1500, ge=1)
    """Ordinary rows with pictures of training size, shorter edge 768 px or more."""
    varied_share: float = added_setting(0.0, ge=0, lt=1)
    """Share of these rows with pictures in styles that have no name: 96 styles, none of them that of a style folder."""
    num_per_style: int = Field(default=150, ge=1)
    """Pictures of 256 px in the folder of each style."""
    num_held_out: int = Field(default=1000, ge=1)
    """Pictures of 256 px with held-out contents, captions and prompts."""
    num_metadata_files: int = Field(default=4, ge=1)
    """Parquet files of metadata; each has an equal share of the rows."""
    workers: int = runtime_setting(2, ge=1)
    """Processes that draw pictures."""


class ClipTraining(Config):
    """Training of the demo's CLIP (section `clip_training` of a recipe)."""

    seed: int = 0
    """Seed of the scenes, the initial weights and the order."""
    num_scenes: int = Field(12_000, ge=500)
    """Training scenes."""
    steps: PositiveInt = 450
    """Optimizer steps."""
    batch_size: int = Field(128, ge=2 * GROUP_SIZE, multiple_of=GROUP_SIZE)
    """Pairs of a picture and a caption in one step."""
    learning_rate: PositiveFloat = 3e-3
    """Highest learning rate of AdamW, reached after a tenth of the steps; it falls to 0 at the end."""
    num_test_scenes: PositiveInt = 1000
    """Held-out scenes for measuring recall."""
    num_threads: PositiveInt = runtime_setting(2)
    """CPU threads of the training, and processes that draw the scenes."""


class AutoencoderTraining(Config):
    """Training of the demo's autoencoder (section `autoencoder_training` of a recipe)."""

    seed: int = 0
    """Seed of the scenes, the initial weights and the order."""
    num_scenes: PositiveInt = 6000
    """Training scenes."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Pictures in one step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest learning rate of AdamW, reached after a tenth of the steps; it falls to 0 at the end."""
    channels: PositiveInt = 8
    """Channels of a latent. One latent encodes 4 x 4 pixels."""
    num_test_scenes: PositiveInt = 512
    """Scenes for measuring the error."""
    latent_noise: PositiveFloat = 0.05
    """Standard deviation of noise on the latents in training: the decoder must tolerate sampling errors."""
    num_threads: PositiveInt = runtime_setting(2)
    """CPU threads of the training, and processes that draw the scenes."""


class JudgeTraining(Config):
    """The demo's judge of contents (section `judge_training` of a recipe)."""

    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order and, with the seed of the world, the scenes. Their random stream is the
    judge's own, so no other model has its pictures."""
    num_scenes: PositiveInt = 8000
    """Training scenes."""
    steps: PositiveInt = 800
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Pictures in one step."""
    learning_rate: PositiveFloat = 3e-3
    """Highest learning rate of AdamW, reached after a tenth of the steps; it falls to 0 at the end."""
    num_pictures: PositiveInt = 300
    """Held-out pictures that measure the CLIP, each with the captions of all values of an attribute."""
    num_threads: PositiveInt = runtime_setting(2)
    """CPU threads of the training, and processes that draw the scenes."""
