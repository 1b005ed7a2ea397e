"""Memory of a training step, counted from the shapes of its tensors on the meta device.

Counts what is alive at the same time: weights, gradients, activations and the autoencoder's own activations. Fused
attention is counted as on a GPU, where it stores no products of queries and keys. Reads and writes nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.model.autoencoder import Autoencoder, encode_in_bf16
from trainer.model.lora import build_trained
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import TrainingRecipe
from trainer.tracking.flops import AUTOENCODERS

BUCKET_BYTES = 500_000_000 * 2
"""DeepSpeed's buffer of bf16 gradients to reduce, with its default size; with several ranks there are two."""
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
"""Bytes of both moments of a trained weight. In 8 bits, blocks of 256 share an fp32 scale."""


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes of all tensors that operations inside the block have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.alive -= num_bytes


class FusedAttention(torch.autograd.Function):
    """Attention with the shapes and the stored tensors of a fused kernel; the values are undefined."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """Takes the place of torch's scaled_dot_product_attention on the meta device."""
    return FusedAttention.apply(query, key, value)


@contextmanager
def counted_as_fused_attention() -> Iterator[None]:
    """Within the block attention takes the memory of a fused kernel."""
    original = torch.nn.functional.scaled_dot_product_attention
    setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)  # noqa: B010
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a GPU in training in bf16 with zero_stage 1, without CUDA's own memory."""

    parameters: int
    trained: int
    state: float
    """All the time: bf16 weights, the rank's share of fp32 masters, moments and averages of those that are trained, and
    the autoencoder that encodes images or draws samples. Without CLIP, which `train.kid_every` keeps on the GPU."""
    passes: float
    """At the peak of a forward and backward pass: activations, gradients and DeepSpeed's buffers. If a step has several
    micro batches, gradients of the earlier ones are there from the start."""
    update: float
    """In the optimizer's step: the gradients in bf16, a flat copy of the rank's share in bf16, and a copy of that in
    fp32, which are there at the same time in DeepSpeed's `stage_1_and_2.py` (0.19.8)."""
    validation: float
    """In a validation or preview: a second network in bf16."""
    encoding: float = 0.0
    """At the peak of encoding the images of a micro batch, with the images."""

    @property
    def peak(self) -> float:
        """The largest sum at one time."""
        return self.state + max(self.passes, self.update, self.validation, self.encoding)


def step_memory(config: TrainingRecipe, latent_shape: tuple[int, int, int], ranks: int = 1) -> StepMemory:
    """Memory of a training step of a micro batch on one of some ranks.

    With source `images` or held-out images there is an autoencoder of the recipe's kind: one of the paper's, or the
    demo's.
    """
    train = config.train
    with torch.device("meta"):
        unet = build_trained(config.model, train.lora).type(torch.bfloat16).train()
    if train.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = sum(weight.numel() for weight in unet.parameters())
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    encoder = encoding = 0
    if train.source == "images" or train.validation_images:
        encoder, encoding = encoding_memory(config.autoencoder, train.size, train.micro_batch)
    # Without decay, the masters are the average.
    average = (4 if train.ema_decay else 0) + 4 * len(train.ema_widths)
    # An fp32 copy of a buffer takes twice its bytes.
    buffers = BUCKET_BYTES * min(2, ranks) * (3 if train.reduce_in_fp32 else 1)
    return StepMemory(
        parameters=parameters,
        trained=trained,
        state=2 * parameters + (4 + MOMENT_BYTES[train.optimizer] + average) * trained / ranks + encoder,
        passes=_peak_of_passes(unet, config, latent_shape, ranks) + buffers,
        update=2 * trained + (2 + 4) * trained / ranks,
        validation=2 * parameters if train.validation_images else 0,
        encoding=encoding if train.source == "images" else 0,
    )


def _peak_of_passes(unet: Any, config: TrainingRecipe, latent_shape: tuple[int, int, int], ranks: int) -> int:
    """Bytes of activations and gradients at their peak in the first two micro batches of a step."""
    train, count = config.train, config.train.micro_batch
    with torch.device("meta"):
        x_t = torch.empty(count, *latent_shape, dtype=torch.bfloat16)
        context = torch.empty(count, train.context_tokens, config.model.context_dim, dtype=torch.bfloat16)
        with counted_as_fused_attention(), PeakMemory() as memory:
            for _ in range(min(2, max(1, train.global_batch // (count * ranks)))):
                predicted = unet(x_t, torch.zeros(count), context, return_dict=False)[0]
                predicted.float().square().mean().backward()
    return memory.peak


def encoding_memory(config: AutoencoderConfig, size: int, count: int) -> tuple[int, int]:
    """Bytes of the autoencoder on a GPU, and of encoding `count` images of size x size at the peak, with the images."""
    with torch.device("meta"):
        network = AUTOENCODERS[config.kind]().eval()
        if config.kind != "patch":
            encode_in_bf16(network)
        images = torch.empty(count, 3, size, size)
        with counted_as_fused_attention(), PeakMemory() as memory:
            Autoencoder(network, config, "").encode_moments(images)
    return sum(weight.nbytes for weight in network.parameters()), memory.peak + images.nbytes
