"""CLIP encodes texts and images as vectors. Every database stores the identity of its encoder."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from retrieval.clip.identity import EncoderIdentity
from retrieval.clip.texts import require_unicode
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, Precision

TEXTS_AT_ONCE, IMAGES_AT_ONCE = 256, 64
"""Rows of a batch."""


class Encoder:
    """A loaded CLIP model. Thread-safe.

    Vectors have length 1, as databases and searches need them. With `unit=False` they keep the length that CLIP gives.
    transform: open_clip's preprocessing of a picture, of which `pixels` does all but the arithmetic on floats.
    """

    def __init__(self, config: ClipConfig, device: str = "cpu", precision: Precision = "fp32") -> None:
        """Load the model. Raises UserError if it cannot be loaded.

        device: `cpu`, `cuda` or `cuda:1`. precision: of the products of matrices; weights and vectors are float32.
        """
        import open_clip  # slower to import than torch; training needs it only for previews
        from torchvision.transforms import Compose, PILToTensor

        self.device = torch.device(device)
        self._model, self.transform = _load(config)
        self._model.eval().requires_grad_(False).to(self.device)
        *steps, _, normalize = self.transform.transforms  # resize, crop, RGB; to floats from 0 to 1; normalize
        self._to_pixels = Compose([*steps, PILToTensor()])
        self._mean, self._std = (
            torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (normalize.mean, normalize.std)
        )
        self._autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self._static_batch = 0
        self._tokenize = open_clip.get_tokenizer(config.model)
        self.context_tokens = int(self._tokenize(["a"]).shape[1])
        """Tokens of a text that the model reads, start and end included."""
        self.identity = EncoderIdentity(
            model=config.model.rsplit("/", maxsplit=1)[-1],
            weights=_weights_digest(self._model),
            preprocessing=json.dumps(open_clip.get_model_preprocess_cfg(self._model), sort_keys=True),
            dim=self.encode_texts(["a"]).shape[1],
        )

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, unit: bool = True) -> npt.NDArray[np.float32]:
        """Vectors of texts, (n, dim) float32. Texts longer than the model's context are truncated.

        Raises UserError for a text with a lone surrogate.
        """
        require_unicode(texts)
        if not len(texts):
            return np.empty((0, self.identity.dim), np.float32)
        batches = (self._tokenize(list(texts[i : i + TEXTS_AT_ONCE])) for i in range(0, len(texts), TEXTS_AT_ONCE))
        return np.concatenate([_rows(self._model.encode_text(batch.to(self.device)), unit) for batch in batches])

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """The texts (at least one) that are longer than the model's context, in order. Raises as `encode_texts`."""
        require_unicode(texts)
        rows = self._tokenize(list(texts))
        longer = self._tokenize(list(texts), context_length=rows.shape[1] + 1)[:, :-1]
        is_truncated = (longer != rows).any(dim=1).tolist()  # else a longer context adds padding only
        return [text for text, truncated in zip(texts, is_truncated, strict=True) if truncated]

    def truncation_note(self, texts: Sequence[str]) -> str:
        """A sentence for texts that are longer than the model's context; "" if there are none.

        Raises as `encode_texts`.
        """
        require_unicode(texts)
        # A token has at least one byte. Besides start and end, some tokenizers add a blank at the start.
        long = [text for text in texts if len(text.encode()) > self.context_tokens - 3]
        if not long or not (cut := self.truncated(long)):
            return ""
        which = "this text" if len(texts) == 1 else f"{len(cut)} of {len(texts)} texts, such as {cut[0][:60]!r}"
        read = f"the first {self.context_tokens} tokens, start and end included"
        return f"CLIP reads only {read}, of {which}: the rest has no effect."

    def encode_images(self, images: Sequence[Image.Image], *, unit: bool = True) -> npt.NDArray[np.float32]:
        """Vectors of pictures of any size and mode, (n, dim) float32."""
        if not len(images):
            return np.empty((0, self.identity.dim), np.float32)
        batches = (images[i : i + IMAGES_AT_ONCE] for i in range(0, len(images), IMAGES_AT_ONCE))
        tensors = (torch.stack([self.pixels(image) for image in batch]) for batch in batches)
        return np.concatenate([_rows(self.encode_pixels(tensor), unit) for tensor in tensors])

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A picture of any size and mode as the model sees it: (3, size, size) uint8."""
        return cast(torch.Tensor, self._to_pixels(image))

    def compile_images(self, batch_size: int) -> None:
        """Compile the network for pictures with torch.compile for batches of this size; smaller ones are filled up.

        Takes minutes at the first batch. Vectors differ by rounding.
        """
        self._model.visual.compile(dynamic=False)
        self._static_batch = batch_size

    @torch.inference_mode()
    def encode_pixels(self, batch: torch.Tensor) -> torch.Tensor:
        """Vectors of `pixels` (n, 3, size, size) uint8, at CLIP's length: (n, dim) float32 on the device.

        Does not wait for the device.
        """
        count = len(batch)
        if count < self._static_batch:
            batch = torch.cat([batch, batch.new_zeros((self._static_batch - count, *batch.shape[1:]))])
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        floats = batch.to(self.device, non_blocking=True).float().div_(255).sub_(self._mean).div_(self._std)
        with self._autocast():
            return cast(torch.Tensor, self._model.encode_image(floats).float()[:count])


def _rows(features: torch.Tensor, unit: bool) -> npt.NDArray[np.float32]:
    rows = features.float()
    return np.asarray((torch.nn.functional.normalize(rows, dim=-1) if unit else rows).cpu().numpy())


def _load(config: ClipConfig) -> tuple[Any, Any]:
    import open_clip

    _check_config(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*QuickGELU mismatch")
            model, _, preprocess = open_clip.create_model_and_transforms(
                config.model, pretrained=config.pretrained or None, weights_only=True
            )
    except (RuntimeError, ValueError, OSError, KeyError, UserWarning) as error:
        raise UserError(
            f"[clip] model = {config.model!r}, pretrained = {config.pretrained!r} cannot be loaded: {error}. "
            "Expected: an open_clip model with its tag or checkpoint, or local-dir:<folder>."
        ) from error
    return model, preprocess


def _check_config(config: ClipConfig) -> None:
    """Raises UserError for settings that open_clip would accept but that give wrong vectors."""
    if not config.pretrained and not config.model.startswith("local-dir:"):
        raise UserError(f"[clip] model = {config.model!r} has no weights. Set pretrained: a tag ('openai') or a path.")
    if config.pretrained == "openai" and not config.model.endswith("-quickgelu"):
        raise UserError(
            f"[clip] model = {config.model!r} with 'openai' weights has the wrong activation: "
            f"write model = '{config.model}-quickgelu'."
        )


def _weights_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
