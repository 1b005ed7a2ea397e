"""CLIP models with random weights in open_clip's folder layout: their speed is that of trained ones."""

import json
from pathlib import Path
from typing import Any


def write_random_clip(folder: Path, architecture: dict[str, Any]) -> str:
    """Write a model, unless the folder exists. architecture: as in open_clip's list. Returns the name to load it by."""
    import open_clip  # with torch, which benchmarks of other stages do not load
    import torch
    from safetensors.torch import save_file

    if not folder.exists():
        torch.manual_seed(0)
        settings = {name: value for name, value in architecture.items() if name != "custom_text"}
        weights = {name: tensor.contiguous() for name, tensor in open_clip.CLIP(**settings).state_dict().items()}
        preprocessing = {"size": architecture["vision_cfg"]["image_size"]}
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
        (partial / "open_clip_config.json").write_text(json.dumps(config))
        save_file(weights, partial / "open_clip_model.safetensors")
        partial.rename(folder)
    return f"local-dir:{folder}"
