import pytest
import torch
from diffusers import AutoencoderKL

from retrieval.storage.root import Root
from tests.trainer.training_set import new_training_set


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained KL autoencoder of factor 8 with 4 channels, in diffusers' layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4}
    AutoencoderKL(layers_per_block=1, **blocks, **widths).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def training_set(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Root:
    """A root with neighbors and latents."""
    return new_training_set(tmp_path_factory.mktemp("root"), autoencoder_folder)
