"""Training with steps and pictures that cannot be used: skipped or replaced, counted, and limited."""

import ast
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training.launched import try_to_train
from tests.trainer.training_set import (
    NAMES,
    SHAPE,
    VIEWS,
    ids_of,
    make_recipe,
    png,
    write_latents,
    write_stage,
    write_tar,
)
from trainer.checkpoint.checkpoint import Progress
from trainer.checkpoint.fragment_files import SavedFragments
from trainer.data.loader import Loader
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.fragments import MASTER, Fragment
from trainer.recipe import TrainingRecipe
from trainer.tracking.training_log import read_step_metrics
from trainer.training.loop import _Loop
from trainer.training.objective import QUARTILES
from trainer.training.step_numbers import LAG, StepRow
from trainer.training.train import checkpoints_of, prepare


def recipe_of(autoencoder_folder: str, **changes: object) -> TrainingRecipe:
    return make_recipe(autoencoder_folder, **{"steps": 20, "checkpoint_every": 1000, **changes})


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run_after_a_checkpoint(
    training_set: Root, autoencoder_folder: str
) -> None:
    moments = np.full((len(ids_of(2)), VIEWS, 2, *SHAPE), np.inf, np.float16)
    write_latents(training_set, NAMES[2], ids_of(2), moments)
    # Without entries of the log the numbers of a step are read LAG steps later.
    recipe = recipe_of(autoencoder_folder, max_skipped_steps=3, log_every=1000)
    code, log = try_to_train(recipe, training_set, ranks=2)
    assert code != 0
    pattern = r"step (\d+): (?:loss is (?:nan|inf) on rank \d|gradient).*Images of the step, by rank: (\{.*?\})\. (\w+)"
    messages = re.findall(pattern, log)
    assert messages, log
    # Rank 0 logs the skipped steps, and all ranks raise the same error.
    assert [word for *_, word in messages if word != "Steps"] == ["4", "4"]
    assert len(messages) >= 5
    plan = prepare(recipe, training_set)
    for step, ids, _ in messages:
        for rank, image_ids in ast.literal_eval(ids).items():
            assert image_ids == Loader(plan, training_set, rank, 2).batch(int(step) - 1).image_ids.tolist()
            assert set(image_ids) & set(ids_of(2).tolist())
    # The next start goes on behind the steps that are done, also with another learning rate.
    changed = prepare(recipe_of(autoencoder_folder, learning_rate=1e-5), training_set)
    checkpoints = checkpoints_of(changed, training_set)
    last = int(messages[-1][0]) + LAG
    assert f"The next start continues after step {last}." in log
    loaders = [Loader(plan, training_set, rank, 2) for rank in range(2)]
    bad = [any(np.isin(loader.batch(step).image_ids, ids_of(2)).any() for loader in loaders) for step in range(last)]
    [entry] = checkpoints.entries()
    assert (entry["step"], entry["skipped"]) == (last, sum(bad))
    with SavedFragments(checkpoints.root, entry["tag"], entry["files"]) as saved:
        weights = Fragment("conv_in.bias", 0, torch.full((32,), np.nan))
        saved.read_into(MASTER, weights)
    assert torch.isfinite(weights.values).all()


def test_pictures_that_cannot_be_read_are_replaced_and_counted_and_too_many_end_the_run(
    training_set: Root, autoencoder_folder: str
) -> None:
    picture = png(Image.fromarray(np.full((80, 96, 3), 90, np.uint8)))
    for number, name in enumerate(NAMES):
        names = [f"{image_id & (2**64 - 1):016x}.jpg" for image_id in ids_of(number).tolist()]
        write_tar(training_set, name, {name: b"" if i % 3 == 0 else picture for i, name in enumerate(names)})
    write_stage(training_set, "download", {}, {})
    code, log = try_to_train(recipe_of(autoencoder_folder, source="images"), training_set)
    assert code != 0
    message = re.search(r"train: (\d+) of (\d+) samples could not be read, train.max_replaced is 0.001", log)
    assert message, log
    replaced, images = map(int, message.groups())
    assert 10 < replaced <= 18
    plan = prepare(recipe_of(autoencoder_folder, source="images"), training_set)
    assert checkpoints_of(plan, training_set).newest_step() == images // 8
    entries = read_step_metrics(training_set.local_path("runs/tiny/train/metrics.jsonl"))
    counts = [entry.replaced_images for entry in entries]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 10


def test_a_run_over_its_limit_goes_on_while_all_pictures_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: _Loop, message: str) -> None:
        raise UserError(message)

    monkeypatch.setattr(_Loop, "_end", end)
    ranks = Ranks(0, 1, torch.device("cpu"))
    loop = _Loop(SimpleNamespace(config=recipe_of("").train, ranks=ranks), Progress(10, 80, 0, 11))
    numbers = torch.ones(1, 5 + 2 * QUARTILES, dtype=torch.float64)
    numbers[0, 1:3] = 0
    loop._count([StepRow(numbers, np.zeros(1, np.int64))])
    assert loop.progress == Progress(11, 88, 0, 11)
    numbers[0, 2] = 1
    with pytest.raises(UserError, match="12 of 96 samples could not be read"):
        loop._count([StepRow(numbers, np.zeros(1, np.int64))])
