"""Snapshots of averages over two starts on different numbers of ranks, and the average of another width from them."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from retrieval.errors import UserError
from retrieval.storage.lease import lease
from retrieval.storage.manifest import read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import make_recipe, new_training_set, plan_of
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.export import read_model_weights
from trainer.checkpoint.fragment_files import SavedFragments
from trainer.checkpoint.snapshots import Snapshots, publish_average, snapshot_folder
from trainer.data.plan import TrainingPlan, is_finished, make_plan
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.engine.power_ema import PowerAverage, state_of
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.training.loop import Session

ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def with_widths(plan: TrainingPlan, *widths: float) -> TrainingPlan:
    """The plan of the same run, as if it had tracked only some of its widths."""
    train_config = plan.config.train.model_copy(update={"ema_widths": widths})
    return replace(plan, config=plan.config.model_copy(update={"train": train_config}))


def test_a_width_made_from_snapshots_of_a_resumed_run_is_the_average_that_it_tracked(
    tmp_path: Path, autoencoder_folder: str
) -> None:
    changes = {"ema_widths": [0.05, 0.1, 0.15], "ema_snapshot_every": 3, "checkpoint_every": 8}
    changes |= {"learning_rate": 1e-2, "global_batch": 4}
    recipe = make_recipe(autoencoder_folder, steps=24, micro_batch=4, **changes)
    root = new_training_set(tmp_path, autoencoder_folder)
    plan = make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))
    snapshots = snapshot_folder(plan, root)
    with pytest.raises(UserError, match=r"ema has no snapshots of this run\. Train it with train\.ema_widths"):
        publish_average(plan, root, 0.15)
    train(make_recipe(autoencoder_folder, steps=7, **changes), root, ranks=2)
    assert [entry["step"] for entry in snapshots.entries()] == [3, 6, 7]
    # A run that is killed may have stored a snapshot after its last checkpoint.
    index = snapshots.root.find_json("checkpoints.json")
    later = snapshots.entries()[-1] | {"step": 8, "tag": "step-00000008"}
    snapshots.root.write_json("checkpoints.json", index | {"checkpoints": [*snapshots.entries(), later]})
    train(recipe, root)
    assert [entry["step"] for entry in snapshots.entries()] == [3, 6, 7, 9, 12, 15, 18, 21, 24]
    final = read_model_weights(root, recipe.train.folder)
    shapes = {name: values.shape for name, values in final.items()}
    states = [state_of(width) for width in (0.15, 0.1)]
    tracked, others = snapshots.read_averages(snapshots.entries()[-1], shapes, states)

    folder = publish_average(with_widths(plan, 0.05, 0.1), root, 0.15)
    assert folder == "runs/tiny-ema-0.15/train"
    manifest = read_manifest(root, folder)
    assert manifest.values["ema_width"] == 0.15
    assert manifest.fingerprint != plan.fingerprint
    assert is_finished(plan, root)
    made = read_model_weights(root, folder)
    assert distance(made, tracked) < 0.2 * distance(others, tracked)
    assert distance(final, tracked) > distance(made, tracked)


def test_an_average_is_published_again_without_its_old_manifest_and_replaces_no_other_run(
    process_group: None, training_set: Root, autoencoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, plan = training_set, plan_of(autoencoder_folder, training_set, ema_widths=[0.1])
    snapshots = snapshot_folder(plan, root)
    weights = build_unet(plan.config.model).named_parameters()
    halves = {f"{state_of(0.1)}/{name}@0": weight.detach().view(-1).half() for name, weight in weights}
    for step in (1, 2):
        snapshots.save_tensors(halves, Progress(step), ONE_RANK)
    snapshots.finish()
    manifests_while_writing = []

    def save_file(*arguments: Any, **keywords: Any) -> None:
        manifests_while_writing.append(root.exists("runs/tiny-ema-0.1/train/manifest.json"))
        safetensors.torch.save_file(*arguments, **keywords)

    monkeypatch.setattr("trainer.checkpoint.export.save_file", save_file)
    folder = publish_average(plan, root, 0.1)
    assert publish_average(plan, root, 0.1) == folder
    assert manifests_while_writing == [False, False]
    manifest = read_manifest(root, folder)
    with lease(root, folder), pytest.raises(UserError, match="Only one process at a time"):
        publish_average(plan, root, 0.1)
    write_manifest(root, replace(manifest, values={}))
    with pytest.raises(UserError, match=r"tiny-ema-0\.1/train has a run that was trained or imported"):
        publish_average(plan, root, 0.1)
    assert read_manifest(root, folder).values == {}
    root.delete(f"{folder}/manifest.json")
    root.write_json(f"{folder}/checkpoints/checkpoints.json", {})
    with pytest.raises(UserError, match=r"has a run that was trained or imported.*Rename or delete this folder"):
        publish_average(plan, root, 0.1)


def test_a_snapshot_is_opened_once_for_all_its_widths(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = CheckpointFolder(Root(tmp_path / "ema"), "test", {}, keep=1, keep_every=1)
    snapshots.save_tensors({f"{state}/w@0": torch.full((3,), i) for i, state in enumerate("ab")}, Progress(1), ONE_RANK)
    snapshots.finish()
    opened: list[str] = []

    def open_fragments(root: Root, folder: str, *rest: Any) -> SavedFragments:
        opened.append(folder)
        return SavedFragments(root, folder, *rest)

    monkeypatch.setattr("trainer.checkpoint.checkpoint.SavedFragments", open_fragments)
    averages = snapshots.read_averages(snapshots.entries()[0], {"w": torch.Size([3])}, ["a", "b"])
    assert [average["w"].tolist() for average in averages] == [[0, 0, 0], [1, 1, 1]]
    assert opened == ["step-00000001"]


def test_a_checkpoint_is_published_after_the_snapshots_up_to_its_step(process_group: None, tmp_path: Path) -> None:
    snapshots, checkpoints = (
        CheckpointFolder(Root(tmp_path / name), "test", {}, keep=1, keep_every=1) for name in ("ema", "checkpoints")
    )
    snapshots_before: list[int] = []
    snapshots.before_publishing = lambda: time.sleep(0.2)  # a slow store
    checkpoints.before_publishing = lambda: snapshots_before.append(snapshots.newest_step())
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).backward()
    optimizer.step()
    average = PowerAverage([Fragment("weight", 0, module.weight.detach().view(-1))], 0.1)
    names = dict.fromkeys(("objective", "loader", "monitor", "training_log", "utilization"))
    session = Session(
        **names,
        config=make_recipe("").train,
        ranks=ONE_RANK,
        engine=SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0),
        average=average,
        checkpoints=checkpoints,
        snapshots=Snapshots(snapshots, [average], every=2),
    )
    session.save_snapshot(Progress(2))
    session.save(Progress(3))
    checkpoints.finish()
    assert (checkpoints.newest_step(), snapshots_before) == (3, [2, 2])  # before its files, and before it is published


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Root of the sum of squared differences of all weights."""
    return float(sum(((left[name] - right[name]) ** 2).sum() for name in right)) ** 0.5
