"""The files of heads (`heads`) and their digests. Does not import torch."""

import hashlib
from collections.abc import Mapping

from retrieval.errors import UserError
from retrieval.recipe import HeadConfig
from retrieval.storage.root import Root

MAX_BYTES = 1 << 28
"""Largest file of a head; LAION's have up to 26 MB."""


def read_head(name: str, config: HeadConfig) -> bytes:
    """The file of a recipe's section `embed.heads.<name>`. Raises UserError if it does not exist or is too large."""
    where, path = head_setting(name, config), config.file
    folder, _, file_name = path.rpartition("/")
    root = Root(folder or ("/" if path.startswith("/") else "."))
    if not root.exists(file_name):
        raise UserError(f"{where} does not exist. Correct the path.")
    with root.open(file_name) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} has more than {MAX_BYTES:,} bytes: wanted linear layers on CLIP vectors.")
    return content


def head_setting(name: str, config: HeadConfig) -> str:
    """The setting of a head's file, for error messages."""
    return f"embed.heads.{name}.file = {config.file}"


def head_digest(name: str, config: HeadConfig, content: bytes) -> str:
    """16 hex digits of the settings and the weights of a head. content: its file."""
    settings = f"{name} {config.activation} {config.output} ".encode()
    return hashlib.sha256(settings + hashlib.sha256(content).digest()).hexdigest()[:16]


def heads_identity(digests: Mapping[str, str], configs: Mapping[str, HeadConfig]) -> str:
    """The weights, settings and thresholds of all heads; "" without heads. digests: by name, of `head_digest`."""
    return "; ".join(f"{digests[name]} {(config.max_score, config.min_score)}" for name, config in configs.items())
