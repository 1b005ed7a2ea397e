"""Checkpoint files from outside: no pickled object is created, damaged and forged files are refused with a reason."""

import gzip
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from retrieval.errors import UserError
from tests.trainer.released.released_model import state_of, write_checkpoint
from tests.trainer.released.test_checkpoint_import import read
from trainer.released.checkpoint_import import has_only_autoencoder


class WritesFile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickled_object_is_refused_and_never_created(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"), extra=WritesFile(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"contains a pickled .*which could run any code"):
        read(path, "laion")
    with pytest.raises(UserError, match=r"contains a pickled .*which could run any code"):
        has_only_autoencoder(path)
    assert not (tmp_path / "ran").exists()


def test_objects_of_lightning_in_the_checkpoint_are_accepted(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = callback
    callbacks = {callback: {"best_model_score": np.float64(0.1), "dirpath": "logs"}}
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"), callbacks=callbacks)
    monkeypatch.undo()
    assert read(path, "laion").unet


def test_a_checkpoint_of_torch_before_1_6_is_read_by_the_same_rules(tmp_path):
    state, path = state_of("imagenet"), tmp_path / "old.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    new = read(write_checkpoint(tmp_path / "new.ckpt", state), "imagenet")
    for name, tensor in read(path, "imagenet").unet.items():
        assert torch.equal(tensor, new.unet[name])
    for cut in (100, path.stat().st_size // 2, path.stat().st_size - 10):
        (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match="not a torch file, or incomplete"):
            read(tmp_path / "cut.ckpt", "imagenet")
    torch.save({"state_dict": state, "model": Path("x")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="contains a pickled pathlib"):
        read(path, "imagenet")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (save({"a": torch.zeros(2)}), "a safetensors file with another suffix"),
        (gzip.compress(b"model"), "a compressed file"),
    ],
)
def test_a_file_of_another_kind_is_named(data, kind, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(data)
    with pytest.raises(UserError, match=kind):
        read(tmp_path / "model.ckpt", "imagenet")


def test_a_tar_of_early_torch_is_named(tmp_path):
    with tarfile.open(tmp_path / "model.ckpt", "w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(UserError, match=r"a tar archive, as torch before 0\.1\.10 wrote"):
        read(tmp_path / "model.ckpt", "imagenet")


def test_an_invalid_or_incomplete_file_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("imagenet"))
    broken = tmp_path / "broken.ckpt"
    for data in (path.read_bytes()[:5000], b"no checkpoint at all"):
        broken.write_bytes(data)
        with pytest.raises(UserError, match=r"not a torch file, or incomplete"):
            read(broken, "imagenet")
    for pickled in (b"broken", b"\x80\x02}q\x00."):
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(broken, "w") as part:
            for name in whole.namelist():
                part.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
        with pytest.raises(UserError, match=r"not a torch file, or incomplete|no state_dict of tensors"):
            read(broken, "imagenet")
    with pytest.raises(UserError, match="no state_dict of tensors"):
        read(write_checkpoint(tmp_path / "other.ckpt", {"betas": 3}), "imagenet")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere.ckpt", "imagenet")
    (tmp_path / "x.safetensors").write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="not a safetensors file"):
        read(tmp_path / "x.safetensors", "imagenet")
    with pytest.raises(UserError, match="not a safetensors file"):
        has_only_autoencoder(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, 1, 1, 1).expand(1 << 20, 1 << 20, 3, 3), torch.zeros(2, 2).to_sparse()],
    ids=["strides of 0", "sparse"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_tensor_that_is_larger_than_its_file_is_refused(tensor, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", {"encoder.conv_in.weight": tensor})
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"does not store all elements of encoder\.conv_in\.weight"):
        has_only_autoencoder(path)
