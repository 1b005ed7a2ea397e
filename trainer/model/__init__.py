"""The networks and their equations: UNet, autoencoders, diffusion process, and cross-attention context."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.model.autoencoder import Autoencoder
    from trainer.model.context import make_context
    from trainer.model.unet import build_unet

__getattr__ = public_names(__name__)
