"""A CLIP model with random weights, in open_clip's folder layout."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from retrieval.recipe import ClipConfig

CONTEXT = 16
ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, seed: int) -> ClipConfig:
    """Write the model and return its configuration. Its vectors have length 32, like those of conftest."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**ARCHITECTURE)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return ClipConfig(model=f"local-dir:{folder}")
