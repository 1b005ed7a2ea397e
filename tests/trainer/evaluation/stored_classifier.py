"""Reads a style classifier that `save_classifier` wrote."""

from typing import Any

from safetensors.torch import load

from retrieval.storage.root import Root
from trainer.evaluation.classifier import StyleClassifier


def read_classifier(root: Root, folder: str) -> tuple[StyleClassifier, dict[str, Any]]:
    """The network in eval mode, and the content of `classifier.json`."""
    settings = root.read_json(f"{folder}/classifier.json")
    with root.open(f"{folder}/classifier.safetensors") as file:
        weights = load(file.read())
    hidden, dim = weights["layers.0.weight"].shape
    network = StyleClassifier(dim, hidden, tuple(settings["styles"]))
    network.load_state_dict(weights)
    return network.eval(), settings
