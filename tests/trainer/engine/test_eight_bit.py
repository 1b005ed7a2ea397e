"""The 8-bit optimizer of bitsandbytes: trains, resumes to the bit, and is refused where it cannot work."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from jobs.train import ranks_here
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import make_recipe, new_training_set
from trainer.checkpoint.fragment_files import SavedFragments, write_fragments
from trainer.engine.deepspeed_engine import Ranks, check_ranks, engine_settings
from trainer.engine.fragments import Fragment
from trainer.recipe import TrainingRecipe
from trainer.tracking.training_log import read_step_metrics

FOLDER = "runs/tiny/train"


def recipe_of(autoencoder_folder: str, **changes: object) -> TrainingRecipe:
    return make_recipe(autoencoder_folder, **{"optimizer": "adamw_8bit", "steps": 6, "ema_decay": 0.0, **changes})


def losses(root: Root) -> list[float]:
    return [entry.loss for entry in read_step_metrics(root.local_path(f"{FOLDER}/metrics.jsonl"))]


@pytest.mark.parametrize(
    "changes", [{"zero_stage": 0}, {"zero_stage": 1, "precision": "bf16"}], ids=["zero 0", "zero 1 in bf16"]
)
def test_a_resumed_run_equals_an_uninterrupted_one_and_trains_like_32_bits(
    changes: dict[str, object], tmp_path: Path, autoencoder_folder: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="need bitsandbytes, which makes each import of diffusers 5 s longer")
    roots = [new_training_set(tmp_path / name, autoencoder_folder) for name in ("whole", "resumed", "adamw")]
    train(recipe_of(autoencoder_folder, **changes), roots[0])
    # The first start averages the weights, the second does not: this changes no weight.
    train(recipe_of(autoencoder_folder, **changes, steps=3, ema_decay=0.9), roots[1])
    newest = roots[1].local_path(f"{FOLDER}/checkpoints/step-00000003/rank-00000.safetensors")
    with safe_open(newest, "pt") as saved:
        keys = saved.keys()
        assert {saved.get_tensor(key).dtype for key in keys if key.startswith("state")} == {torch.uint8}
    assert {key.split("/")[0] for key in keys} == {"master", "average", "state1", "state2", "absmax1", "absmax2"}
    train(recipe_of(autoencoder_folder, **changes), roots[1])
    assert losses(roots[1]) == losses(roots[0])
    checksums = [json.dumps(read_manifest(root, FOLDER).checksums()) for root in roots[:2]]
    assert checksums[0] == checksums[1]
    train(recipe_of(autoencoder_folder, **changes, optimizer="adamw"), roots[2])
    assert losses(roots[0]) == pytest.approx(losses(roots[2]), rel=0.03)
    assert losses(roots[0])[-1] != losses(roots[2])[-1]
    for root in roots:
        shutil.rmtree(root.local_path(""))


def test_it_is_refused_without_its_package_on_several_ranks_and_with_sharded_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = recipe_of("", ranks=1).train
    for check in (check_ranks, lambda config, world: engine_settings(config, Ranks(0, world, torch.device("cpu")))):
        with pytest.raises(UserError, match=r"needs bitsandbytes: run '\.venv/bin/python -m pip install bits"):
            check(config, 1)
        with pytest.raises(UserError, match=r"works on one rank, this run has 2\. Set train\.ranks = 1"):
            check(config, 2)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        ranks_here(config)
    assert ranks_here(config.model_copy(update={"optimizer": "adamw"})) == 1
    with pytest.raises(ValidationError, match='"adamw_8bit" work with zero_stage 0, 1 and 2'):
        recipe_of("", zero_stage=3)


def test_moments_of_other_tensors_than_the_optimizers_are_refused(tmp_path: Path) -> None:
    root = Root(tmp_path)
    moments = {f"state1/master{number}@0": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate((6, 4))}
    write_fragments(root, "step/rank-00000.safetensors", moments)
    with SavedFragments(root, "step", ["rank-00000.safetensors"]) as saved:
        saved.check_lengths("state1", [Fragment("master0", 0, torch.zeros(6)), Fragment("master1", 0, torch.zeros(4))])
        for other in (Fragment("master0", 0, torch.zeros(10)), Fragment("master2", 0, torch.zeros(1))):
            with pytest.raises(UserError, match=rf"state1 of {other.name}, the optimizer has .* set train\.zero_stage"):
                saved.check_lengths("state1", [other])
