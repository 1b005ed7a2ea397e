import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe, plan_of
from trainer.data.plan import TrainingPlan
from trainer.tracking.dashboards import open_dashboards
from trainer.tracking.training_log import (
    StepMetrics,
    TrainingLog,
    ValidationMetrics,
    read_entries,
    read_step_metrics,
    summarize,
)
from trainer.training.train import prepare


def step_metrics(step: int, loss: float = 0.5) -> StepMetrics:
    times = {"images_per_s": 80.0, "seconds_per_step": 0.1, "waiting_s": 0.01, "paused_s": 0.02}
    others = {"mfu": 0.4, "memory_gib": 1.5, "loss_by_quartile": [0.9, None, 0.3, 0.2]}
    others |= {"images": 8 * step, "skipped_steps": 0, "replaced_images": 0, "global_batch": 8}
    others |= {"weight_decay": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.9999}
    return StepMetrics(step=step, loss=loss, grad_norm=1.0, learning_rate=1e-3, **times, **others)


def validation(step: int) -> ValidationMetrics:
    return ValidationMetrics(step, 0.5, [0.8, 0.5, 0.4, 0.3], 0.4, [0.7, 0.4, 0.3, 0.2])


def record(folder: Path, plan: TrainingPlan, done: int, steps: range) -> None:
    """Record steps of a run that continues after `done` steps."""
    training_log = TrainingLog(folder, done, 10, open_dashboards(plan, folder, done))
    for step in steps:
        training_log.add_step(step_metrics(step, loss=step / 10 + done / 100))
        if step % 2 == 0:
            training_log.add_validation(validation(step))
            training_log.add_preview(Image.new("RGB", (30, 20), (step, done, 0)), step)
    training_log.close()


def test_a_resumed_run_records_each_step_once_in_files_previews_and_tensorboard(
    training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    plan = plan_of(autoencoder_folder, training_set)
    record(tmp_path, plan, 0, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')
    (tmp_path / "previews/.00000008.png").write_bytes(b"of a run that was killed while it drew a sheet")
    record(tmp_path, plan, 3, range(4, 6))
    entries = read_step_metrics(tmp_path / "metrics.jsonl")
    assert [(entry.step, entry.loss) for entry in entries] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, pytest.approx(0.43)),
        (5, pytest.approx(0.53)),
    ]
    assert entries[0].loss_by_quartile == [0.9, None, 0.3, 0.2]
    assert read_entries(tmp_path / "validation.jsonl", ValidationMetrics) == [validation(2), validation(4)]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["00000002.png", "00000004.png"]
    assert Image.open(tmp_path / "previews/00000004.png").getpixel((0, 0)) == (4, 3, 0)

    tensorboard = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in tensorboard.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert tensorboard.Scalars("train/loss")[3].value == pytest.approx(0.43)
    assert tensorboard.Scalars("train/mfu")[0].value == pytest.approx(0.4)
    assert tensorboard.Scalars("train/loss_by_quartile/3")[0].value == pytest.approx(0.3)
    assert "train/loss_by_quartile/2" not in tensorboard.Tags()["scalars"]
    assert [event.step for event in tensorboard.Scalars("validation/ema_loss")] == [2, 4]
    assert [(event.step, event.width) for event in tensorboard.Images("samples")] == [(2, 30), (4, 30)]


def test_log_lines_have_all_metrics(
    training_set: Root, autoencoder_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "train")
    record(tmp_path, plan_of(autoencoder_folder, training_set), 0, range(4, 5))
    first, second, third = caplog.messages
    assert first == (
        "step 4/10  loss 0.4000  grad 1.000  lr 1.00e-03  80.0 images/s  data 0.010 s  MFU 40.0%  1.50 GiB  eta 0:00:01"
    )
    assert "held-out loss 0.5000  averaged weights 0.4000  by timestep 0.8000  0.5000  0.4000  0.3000" in second
    assert third.endswith("previews/00000004.png")


def test_weights_and_biases_records_the_same_curves_offline(
    training_set: Root, autoencoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds for the start of its process
    plan = plan_of(autoencoder_folder, training_set, wandb=True, wandb_project="rdm")
    record(tmp_path, plan, 0, range(1, 5))
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.name == f"run-tiny-{plan.checkpoint_identity}.wandb"

    def is_complete() -> bool:
        """Whether the file contains the plain name for each step, and the folder the pictures."""
        stored, pictures = path.read_bytes(), list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
        has_losses = stored.count(b"train/mfu") >= 4 and stored.count(b"validation/ema_loss_by_quartile/4") >= 2
        return has_losses and len(pictures) == 2

    # A separate process writes them, on a busy machine after finish() has returned.
    deadline = time.monotonic() + 300
    while not is_complete():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_missing_wandb_package_is_an_error_before_training_starts(
    training_set: Root, autoencoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = make_recipe(autoencoder_folder, wandb=True, wandb_project="rdm")
    with pytest.raises(UserError, match=r"the recipe sets wandb, but the package wandb is not installed.*pip install"):
        prepare(recipe, training_set)


def test_weights_and_biases_needs_a_project() -> None:
    with pytest.raises(ValidationError, match="wandb = true needs a wandb_project"):
        make_recipe("", wandb=True)


def test_a_run_without_a_finite_step_is_an_error() -> None:
    with pytest.raises(UserError, match="none was finite"):
        summarize([])
