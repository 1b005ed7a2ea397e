"""Heads: the published layouts give the scores of the torch modules that they were saved from; others are refused."""

import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from retrieval import UserError
from retrieval.clip.heads import load_head
from retrieval.recipe import HeadConfig

DIM = 12
VECTORS = nn.functional.normalize(torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)))


def linear(*sizes: int) -> list[nn.Linear]:
    torch.manual_seed(sum(sizes))
    return [nn.Linear(a, b) for a, b in pairwise(sizes)]


class SafetyL14(nn.Module):
    """The layout of LAION's safety head for ViT-L/14: normalized inputs, attributes with numbers, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.linspace(-0.1, 0.1, DIM))
        self.norm.register_buffer("variance", torch.linspace(0.01, 0.2, DIM))
        self.linear_1, self.linear_2, self.linear_3 = linear(DIM, 8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        return self.linear_3(self.linear_2(self.linear_1(x).relu()).relu()).sigmoid()


class Layers(nn.Module):
    """A Sequential as an attribute, as in LAION's head for ViT-H/14 and in the improved aesthetic predictor."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def safety_h14() -> nn.Module:
    layers = linear(DIM, 9, 7, 8, 5, 4, 3, 1)
    between = [module for layer in layers[:-2] for module in (layer, nn.ReLU(), nn.Dropout(0.2))]
    return Layers(*between, *layers[-2:])  # no ReLU between the last two


def improved_aesthetics() -> nn.Module:
    first, second, third, fourth, last = linear(DIM, 9, 7, 5, 3, 1)
    drop = nn.Dropout(0.2)
    return Layers(first, drop, second, drop, third, drop, fourth, last)


PUBLISHED = [
    (SafetyL14, "relu", "sigmoid"),
    (safety_h14, "relu", "none"),
    (improved_aesthetics, "none", "none"),
    (lambda: linear(DIM, 1)[0], "none", "none"),  # LAION's aesthetic predictor: keys without a prefix
]


@pytest.mark.parametrize(("make", "activation", "output"), PUBLISHED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_layout_gives_the_scores_of_its_module(
    make: Callable[[], nn.Module], activation: str, output: str, suffix: str, tmp_path: Path
) -> None:
    module, path = make().eval(), tmp_path / f"head{suffix}"
    save_file(module.state_dict(), path) if suffix == ".safetensors" else torch.save(module.state_dict(), path)
    config = HeadConfig.model_validate({"file": str(path), "activation": activation, "output": output})
    scores = load_head("unsafe", config, DIM).scores(VECTORS.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(scores, module(VECTORS)[:, 0].numpy(), atol=1e-6)
    assert scores.dtype == np.float32
    assert np.ptp(scores) > 1e-3


def test_the_digest_changes_with_weights_and_settings(tmp_path: Path) -> None:
    def digest(seed: int, output: str) -> str:
        torch.manual_seed(seed)
        torch.save(nn.Linear(DIM, 1).state_dict(), tmp_path / "head.pth")
        config = {"file": str(tmp_path / "head.pth"), "activation": "none", "output": output}
        return load_head("unsafe", HeadConfig.model_validate(config), DIM).digest

    assert digest(0, "none") == digest(0, "none")
    assert len({digest(0, "none"), digest(1, "none"), digest(0, "sigmoid")}) == 3


class _Attack:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was run')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Attack()), "is not a .safetensors file or a torch file"),
        (b"nothing", "is not a .safetensors file or a torch file"),
        ([torch.zeros(1, DIM)], "is no state dict"),
        ({}, "it is empty"),
        (nn.Conv2d(3, 1, 2).state_dict(), "is no stack of linear layers: weight"),
        (nn.BatchNorm1d(DIM).state_dict(), "is no stack of linear layers: num_batches_tracked, running_mean"),
        (nn.Linear(DIM + 1, 1).state_dict(), f"takes vectors of length {DIM + 1}; the recipe's CLIP model gives {DIM}"),
        (nn.Linear(DIM, 2).state_dict(), "the last with 1 output"),
        (Layers(nn.Linear(DIM, 5), nn.Linear(4, 1)).state_dict(), f"has the layers {DIM} to 5, 4 to 1"),
        ({"weight": torch.zeros(1, DIM), "norm.mean": torch.zeros(DIM)}, "wanted a mean and a variance"),
        ({"weight": torch.zeros(1, DIM), "mean": torch.zeros(3), "variance": torch.ones(3)}, "normalizes 3 and 3"),
    ],
)
def test_other_files_are_refused_with_their_setting(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    config = HeadConfig(file=str(path), activation="none", output="none")
    with pytest.raises(UserError, match=message) as error:
        load_head("unsafe", config, DIM)
    assert "embed.heads.unsafe.file" in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"embed.heads.unsafe.file = /nowhere/head.pth does not exist"):
        load_head("unsafe", HeadConfig(file="/nowhere/head.pth", activation="none", output="none"), DIM)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_file_is_read_or_refused(is_zip: bool, tmp_path: Path) -> None:
    stored = io.BytesIO()
    torch.save(torch.nn.Linear(8, 1).state_dict(), stored, _use_new_zipfile_serialization=is_zip)
    config = HeadConfig(file=str(tmp_path / "head.pth"), activation="none", output="none")
    random, refused = np.random.default_rng(0), 0
    for _ in range(200):
        content = bytearray(stored.getvalue())
        for position in random.integers(len(content), size=3):
            content[position] = random.integers(256)
        (tmp_path / "head.pth").write_bytes(content)
        try:
            load_head("unsafe", config, 8)
        except UserError:
            refused += 1
    assert refused > 100
