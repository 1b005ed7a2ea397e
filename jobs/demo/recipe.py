"""The settings of the demo's own world and models: sections `world`, `clip_training`, `autoencoder_training`.

Nothing that computes is imported here: who reads or checks settings need not wait for torch.
"""

from pydantic import Field, PositiveFloat, PositiveInt

from retrieval.config import Config, runtime_setting

# Scenes of a batch that share style, color and background, so that shape, count and layout matter too.
TWINS = 4


class WorldConfig(Config):
    """The size of the demo world and where it is served (section `world` of a recipe)."""

    seed: int = Field(default=0, ge=0)
    """Decides every picture and every row."""
    port: int = Field(default=28_123, ge=1, le=65_535)
    """Loopback TCP port of the server, part of every URL; by default below those of outgoing connections."""
    num_database: int = Field(default=5000, ge=1)
    """Ordinary rows of database size, 224 to 320 px an edge."""
    num_train: int = Field(default=1500, ge=1)
    """Ordinary rows of training size, shorter edge of 768 px or more."""
    num_per_style: int = Field(default=150, ge=1)
    """Pictures of 256 px in each style's folder."""
    num_held_out: int = Field(default=1000, ge=1)
    """Pictures of 256 px of contents that no other picture shows, with captions and prompts."""
    num_metadata_files: int = Field(default=4, ge=1)
    """Parquet files that the rows are spread over."""
    workers: int = runtime_setting(2, ge=1)
    """Processes that draw."""


class ClipTraining(Config):
    """Training of the demo's CLIP (section `clip_training` of a recipe)."""

    seed: int = 0
    """Seed of the scenes, the initial weights and the order."""
    num_scenes: int = Field(12_000, ge=1000)
    """Scenes drawn for training."""
    steps: PositiveInt = 450
    """Optimizer steps."""
    batch_size: int = Field(128, ge=2 * TWINS, multiple_of=TWINS)
    """Pairs of a picture and a caption in one step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest step size of AdamW, after a tenth of the steps; it falls to 0 at the end."""
    num_test_scenes: PositiveInt = 1000
    """Held-out scenes that the recall is measured on."""
    num_threads: PositiveInt = runtime_setting(2)
    """CPU threads of the training, and processes that draw."""


class AutoencoderTraining(Config):
    """Training of the demo's autoencoder (section `autoencoder_training` of a recipe)."""

    seed: int = 0
    """Seed of the scenes, the initial weights and the order."""
    num_scenes: PositiveInt = 6000
    """Scenes drawn for training."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Pictures in one step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest step size of AdamW, after a tenth of the steps; it falls to 0 at the end."""
    channels: PositiveInt = 8
    """Channels of a latent; it stands for 4 x 4 pixels."""
    latent_noise: PositiveFloat = 0.05
    """Noise on the latents in training, in deviations: the decoder learns to bear a sampler's errors."""
    num_threads: PositiveInt = runtime_setting(2)
    """CPU threads of the training, and processes that draw."""
