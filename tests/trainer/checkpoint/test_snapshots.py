"""Snapshots of averages over two starts on different numbers of ranks, and the average of another width from them."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import make_recipe, new_training_set
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.export import read_model_weights
from trainer.checkpoint.snapshots import Snapshots, publish_average, snapshot_folder
from trainer.data.plan import TrainingPlan, is_finished, make_plan
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import Fragment
from trainer.engine.power_ema import PowerAverage, state_of
from trainer.model.autoencoder import Autoencoder
from trainer.training.loop import Session


def with_widths(plan: TrainingPlan, *widths: float) -> TrainingPlan:
    """The plan of the same run, as if it had tracked only some of its widths."""
    train_config = plan.config.train.model_copy(update={"ema_widths": widths})
    return replace(plan, config=plan.config.model_copy(update={"train": train_config}))


def test_a_width_made_from_snapshots_of_a_resumed_run_is_the_average_that_it_tracked(
    tmp_path: Path, autoencoder_folder: str
) -> None:
    changes = {"ema_widths": [0.05, 0.1, 0.15], "ema_snapshot_every": 3, "checkpoint_every": 2}
    recipe = make_recipe(autoencoder_folder, steps=24, learning_rate=1e-2, **changes)
    root = new_training_set(tmp_path, autoencoder_folder)
    plan = make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))
    snapshots = snapshot_folder(plan, root)
    with pytest.raises(UserError, match=r"ema has no snapshots of this run\. Train it with train\.ema_widths"):
        publish_average(plan, root, 0.15)
    train(make_recipe(autoencoder_folder, steps=7, learning_rate=1e-2, **changes), root, ranks=2)
    assert [entry["step"] for entry in snapshots.entries()] == [3, 6, 7]
    # A run that is killed may have stored a snapshot after its last checkpoint.
    index = snapshots.root.find_json("checkpoints.json")
    later = snapshots.entries()[-1] | {"step": 8, "tag": "step-00000008"}
    snapshots.root.write_json("checkpoints.json", index | {"checkpoints": [*snapshots.entries(), later]})
    train(recipe, root)
    assert [entry["step"] for entry in snapshots.entries()] == [3, 6, 7, 9, 12, 15, 18, 21, 24]
    final = read_model_weights(root, recipe.train.folder)
    shapes = {name: values.shape for name, values in final.items()}
    tracked = snapshots.read_average(snapshots.entries()[-1], shapes, state_of(0.15))

    folder = publish_average(with_widths(plan, 0.05, 0.1), root, 0.15)
    assert folder == "runs/tiny-ema-0.15/train"
    manifest = read_manifest(root, folder)
    assert manifest.values["ema_width"] == 0.15
    assert manifest.fingerprint != plan.fingerprint
    assert is_finished(plan, root)
    made = read_model_weights(root, folder)
    others = snapshots.read_average(snapshots.entries()[-1], shapes, state_of(0.1))
    assert distance(made, tracked) < 0.2 * distance(others, tracked)
    assert distance(final, tracked) > distance(made, tracked)


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
    ranks = Ranks(0, 1, torch.device("cpu"))
    names = dict.fromkeys(("config", "objective", "loader", "monitor", "training_log", "utilization"))
    session = Session(
        **names,
        ranks=ranks,
        engine=SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0),
        average=average,
        checkpoints=checkpoints,
        snapshots=Snapshots(snapshots, [average], every=2),
    )
    session.snapshots.save(Progress(2), ranks)
    session.save(Progress(3))
    checkpoints.finish()
    assert (checkpoints.newest_step(), snapshots_before) == (3, [2])


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Root of the sum of squared differences of all weights."""
    return float(sum(((left[name] - right[name]) ** 2).sum() for name in right)) ** 0.5
