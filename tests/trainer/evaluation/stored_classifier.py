"""Reads a style classifier that `save_classifier` wrote."""

from typing import Any

from safetensors.torch import load

from retrieval.storage.root import Root
from trainer.evaluation.classifier import StyleClassifier


def read_classifier(root: Root, folder: str) -> tuple[StyleClassifier, dict[str, Any]]:
    """The network in eval mode, and the content of `classifier.json`."""
    settings = root.read_json(f"{folder}/classifier.json")
    network = StyleClassifier(settings["dim"], settings["hidden"], tuple(settings["styles"]))
    with root.open(f"{folder}/classifier.safetensors") as file:
        network.load_state_dict(load(file.read()))
    return network.eval(), settings
