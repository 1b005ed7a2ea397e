import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe
from trainer.data.plan import Plan, make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.tracking.boards import open_boards
from trainer.tracking.progress import Point, Progress, Validation, read_points, read_validations
from trainer.training.train import prepare


def plan_of(autoencoder_folder: str, root: Root, **changes: object) -> Plan:
    recipe = make_recipe(autoencoder_folder, **changes)
    return make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))


def point(step: int, loss: float = 0.5) -> Point:
    times = {"images_per_s": 80.0, "seconds_per_step": 0.1, "waiting_s": 0.01, "paused_s": 0.02}
    rest = {"mfu": 0.4, "memory_gib": 1.5, "loss_by_quartile": [0.9, None, 0.3, 0.2]}
    return Point(step=step, loss=loss, grad_norm=1.0, learning_rate=1e-3, **times, **rest)


def validation(step: int) -> Validation:
    return Validation(step, 0.5, [0.8, 0.5, 0.4, 0.3], 0.4, [0.7, 0.4, 0.3, 0.2])


def note(folder: Path, plan: Plan, done: int, steps: range) -> None:
    """What a run notes that goes on after `done` steps."""
    progress = Progress(folder, done, 10, open_boards(plan, folder, done))
    for step in steps:
        progress.add(point(step, loss=step / 10 + done / 100))
        if step % 2 == 0:
            progress.add_validation(validation(step))
            progress.add_preview(Image.new("RGB", (30, 20), (step, done, 0)), step)
    progress.close()


def test_a_resumed_run_notes_each_step_once_in_files_pictures_and_tensorboard(
    training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    plan = plan_of(autoencoder_folder, training_set)
    note(tmp_path, plan, 0, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')
    note(tmp_path, plan, 3, range(4, 6))
    points = read_points(tmp_path / "metrics.jsonl")
    assert [(one.step, one.loss) for one in points] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, pytest.approx(0.43)),
        (5, pytest.approx(0.53)),
    ]
    assert points[0].loss_by_quartile == [0.9, None, 0.3, 0.2]
    assert read_validations(tmp_path / "validation.jsonl") == [validation(2), validation(4)]
    assert sorted(one.name for one in (tmp_path / "previews").iterdir()) == ["00000002.png", "00000004.png"]
    assert Image.open(tmp_path / "previews/00000004.png").getpixel((0, 0)) == (4, 3, 0)

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [one.step for one in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert board.Scalars("train/loss")[3].value == pytest.approx(0.43)
    assert board.Scalars("train/mfu")[0].value == pytest.approx(0.4)
    assert board.Scalars("train/loss_by_quartile/3")[0].value == pytest.approx(0.3)
    assert "train/loss_by_quartile/2" not in board.Tags()["scalars"]
    assert [one.step for one in board.Scalars("validation/ema_loss")] == [2, 4]
    assert [(one.step, one.width) for one in board.Images("samples")] == [(2, 30), (4, 30)]


def test_a_line_of_the_log_tells_everything(
    training_set: Root, autoencoder_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "train")
    note(tmp_path, plan_of(autoencoder_folder, training_set), 0, range(4, 5))
    first, second, third = caplog.messages
    assert first == (
        "step 4/10  loss 0.4000  grad 1.000  lr 1.00e-03  80.0 images/s  data 0.010 s  MFU 40.0%  1.50 GiB  "
        "eta 0:00:01"
    )
    assert (
        "held-out loss 0.5000  averaged weights 0.4000  by timestep 0.8000  0.5000  0.4000  0.3000" in second
    )
    assert third.endswith("previews/00000004.png")


def test_weights_and_biases_gets_the_same_curves_offline(
    training_set: Root, autoencoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    plan = plan_of(autoencoder_folder, training_set, wandb=True, wandb_project="rdm")
    note(tmp_path, plan, 0, range(1, 5))
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.name == f"run-tiny-{plan.identity}.wandb"
    # Its own format, in which names stand as they are, once for each step they were logged at. A process of
    # its own writes it, on a busy machine after finish() returned.
    until = time.monotonic() + 60
    while (stored := path.read_bytes()).count(b"train/mfu") < 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert stored.count(b"train/mfu") >= 4
    assert stored.count(b"validation/ema_loss_by_quartile/4") >= 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2


def test_weights_and_biases_that_is_not_installed_is_refused_before_anything_starts(
    training_set: Root, autoencoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "trainer.tracking.wandb_board", raising=False)
    recipe = make_recipe(autoencoder_folder, wandb=True, wandb_project="rdm")
    with pytest.raises(UserError, match=r"wandb = true, but the package wandb is not installed.*pip install"):
        prepare(recipe, training_set)


def test_weights_and_biases_without_a_project_is_refused() -> None:
    with pytest.raises(ValidationError, match="wandb = true needs the name of a wandb_project"):
        make_recipe("", wandb=True)
