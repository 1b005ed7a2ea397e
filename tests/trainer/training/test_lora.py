"""Adapters are trained, saved, resumed, merged and exported; the weights that they change stay as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import DIM, make_recipe, new_training_set
from trainer.checkpoint.export import export_run, read_model_weights
from trainer.data.plan import make_plan
from trainer.engine.optimizer import make_optimizer
from trainer.model.autoencoder import Autoencoder
from trainer.model.lora import UP, add_adapters
from trainer.model.recipe import LoraConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe
from trainer.released.run_folder import SourceRun
from trainer.tracking.training_log import read_step_metrics

TARGETS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.2")
LORA = LoraConfig(rank=4, alpha=8.0, target=TARGETS)
STEPS = 8


def recipe_of(autoencoder_folder: str, **changes: object) -> TrainingRecipe:
    settings = {"name": "lora", "start_from": "tiny", "lora": LORA.model_dump(), "steps": STEPS, "learning_rate": 0.02}
    settings |= {"validation_images": 8, "validate_every": STEPS, "zero_stage": 1, "micro_batch": 4}
    return make_recipe(autoencoder_folder, **settings | changes)


def folder_of(root: Root) -> Path:
    return root.local_path("runs/lora/train")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Root:
    """A root with a finished run without adapters."""
    root = new_training_set(tmp_path_factory.mktemp("lora"), autoencoder_folder)
    train(make_recipe(autoencoder_folder, steps=2), root)
    return root


@pytest.fixture(scope="module")
def finished(started: Root, autoencoder_folder: str) -> Root:
    """The same root with an uninterrupted run of adapters on two ranks."""
    log = train(recipe_of(autoencoder_folder), started, ranks=2)
    trained = sum(
        weight.numel() for weight in adapted(started, autoencoder_folder).parameters() if weight.requires_grad
    )
    assert f"{trained:,} trained parameters" in log
    return started


def adapted(root: Root, autoencoder_folder: str) -> torch.nn.Module:
    """The network of the run that the adapters started from, with new adapters."""
    unet = build_unet(make_recipe(autoencoder_folder).model)
    unet.load_state_dict(read_model_weights(root, "runs/tiny/train"))
    add_adapters(unet, LORA)
    return unet.eval()


def output(unet: torch.nn.Module, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    noisy, context = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8, 8), (3, 4, DIM)))
    with torch.set_grad_enabled(grad):
        predicted: torch.Tensor = unet(noisy, torch.tensor([0, 500, 999]), context, return_dict=False)[0]
    return predicted


def test_new_adapters_change_nothing(started: Root, autoencoder_folder: str) -> None:
    unet = build_unet(make_recipe(autoencoder_folder).model)
    unet.load_state_dict(read_model_weights(started, "runs/tiny/train"))
    assert torch.equal(output(adapted(started, autoencoder_folder)), output(unet.eval()))


def test_the_loss_falls_and_the_frozen_weights_keep_their_bits(started: Root, autoencoder_folder: str) -> None:
    """The target is what the network computes with other adapters."""
    unet, teacher = adapted(started, autoencoder_folder), adapted(started, autoencoder_folder)
    torch.manual_seed(6)
    for name, weight in teacher.named_parameters():
        if name.endswith(UP):
            torch.nn.init.normal_(weight, std=0.5)
    frozen = {name: weight.clone() for name, weight in unet.named_parameters() if not weight.requires_grad}
    optimizer = make_optimizer(unet, recipe_of(autoencoder_folder, weight_decay=0.1).train)
    wanted, losses = output(teacher), []
    for _ in range(30):
        loss = (output(unet, grad=True) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    after = dict(unet.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in frozen.items())
    assert all(weight.grad is None for name, weight in after.items() if name in frozen)


def test_only_the_adapters_are_trained_and_the_model_has_them_merged(finished: Root, autoencoder_folder: str) -> None:
    base = read_model_weights(finished, "runs/tiny/train")
    merged = read_model_weights(finished, "runs/lora/train")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    targets = {name for name in base if name.removesuffix(".weight").endswith(TARGETS) and not name.endswith(".bias")}
    assert changed == targets


def test_the_adapters_alone_are_in_pefts_layout_and_compute_what_the_merged_model_computes(
    finished: Root, autoencoder_folder: str
) -> None:
    folder = folder_of(finished) / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == list(TARGETS)
    tensors = load_file(folder / "adapter_model.safetensors")
    unet = adapted(finished, autoencoder_folder)
    names = [name for name, weight in unet.named_parameters() if weight.requires_grad]
    assert sorted(tensors) == sorted(f"base_model.model.{name}" for name in names)
    without = output(unet)
    unet.load_state_dict({name: tensors[f"base_model.model.{name}"] for name in names}, strict=False)
    merged = build_unet(make_recipe(autoencoder_folder).model).eval()
    merged.load_state_dict(read_model_weights(finished, "runs/lora/train"))
    torch.testing.assert_close(output(unet), output(merged), rtol=0, atol=1e-5)
    assert (output(merged) - without).abs().max() > 0.01
    assert {name for name in read_manifest(finished, "runs/lora/train").checksums() if "adapter" in name} == {
        "runs/lora/train/adapter/adapter_config.json",
        "runs/lora/train/adapter/adapter_model.safetensors",
    }


def test_a_resumed_run_equals_an_uninterrupted_one_and_checkpoints_have_only_adapters(
    finished: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    root = Root(tmp_path / "resumed")
    for name in ("neighbors", "latents", "runs/tiny"):
        root.local_path(name).parent.mkdir(parents=True, exist_ok=True)
        root.local_path(name).symlink_to(finished.local_path(name), target_is_directory=True)
    train(recipe_of(autoencoder_folder, steps=5), root, ranks=2)
    files = sorted((folder_of(root) / "checkpoints/step-00000005").iterdir())
    keys = {key for file in files for key in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert all("lora_" in key for key in keys)
    assert {key.split("/")[0] for key in keys} == {"master", "exp_avg", "exp_avg_sq", "average"}
    with pytest.raises(UserError, match=r"has only the adapters of train\.lora"):
        (folder_of(root) / "manifest.json").unlink()
        SourceRun.open(folder_of(root)).read(recipe_of(autoencoder_folder))
    train(recipe_of(autoencoder_folder), root, ranks=2)
    assert history(root) == history(finished)
    checksums = (read_manifest(each, "runs/lora/train").checksums() for each in (root, finished))
    assert len({json.dumps(sums, sort_keys=True) for sums in checksums}) == 1


def up_matrices(root: Root) -> torch.Tensor:
    """The exported matrices that are 0 in untrained adapters, flat."""
    tensors = load_file(folder_of(root) / "adapter/adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.endswith(UP)])


def history(root: Root) -> list[tuple[int, float, float]]:
    return [(entry.step, entry.loss, entry.grad_norm) for entry in read_step_metrics(folder_of(root) / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"zero_stage": 0}, 0.01),
        (
            {"zero_stage": 2, "precision": "bf16", "activation_checkpointing": True, "decay_norms_and_biases": False},
            0.3,
        ),
    ],
    ids=["zero 0", "zero 2 in bf16"],
)
def test_other_zero_stages_and_formats_give_the_same_adapters(
    changes: dict[str, object], tolerance: float, finished: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    root = Root(tmp_path / "other")
    for name in ("neighbors", "latents", "runs/tiny"):
        root.local_path(name).parent.mkdir(parents=True, exist_ok=True)
        root.local_path(name).symlink_to(finished.local_path(name), target_is_directory=True)
    train(recipe_of(autoencoder_folder, **changes), root)
    expected = up_matrices(finished)
    # Of untrained adapters this is 1.
    assert (up_matrices(root) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    ("target", "message"),
    [("to_z", "names no layer of the network"), ("conv1", r"names down_blocks.*conv1, which is no linear layer")],
)
def test_a_target_that_is_no_linear_layer_is_refused(target: str, message: str, autoencoder_folder: str) -> None:
    with torch.device("meta"):
        unet = build_unet(make_recipe(autoencoder_folder).model)
    with pytest.raises(UserError, match=message):
        add_adapters(unet, LoraConfig(target=(target,)))


def test_targets_may_overlap(autoencoder_folder: str) -> None:
    names = []
    for target in (("attn2.to_k", "to_k"), ("to_k",)):
        unet = build_unet(make_recipe(autoencoder_folder).model)
        add_adapters(unet, LoraConfig(target=target))
        names.append([name for name, weight in unet.named_parameters() if weight.requires_grad])
    assert names[0] == names[1]


def test_adapters_are_not_merged_into_another_run_than_they_were_trained_on(
    finished: Root, autoencoder_folder: str
) -> None:
    recipe = recipe_of(autoencoder_folder)
    plan = make_plan(recipe, finished, Autoencoder.load(recipe.autoencoder, "cpu"))
    before = read_manifest(finished, "runs/lora/train")
    other = replace(plan, upstream=plan.upstream | {"start_from": "another"})
    with pytest.raises(UserError, match=r"runs/tiny/train is another run than the one that the adapters"):
        export_run(other, finished, {}, {}, 0.0)
    assert read_manifest(finished, "runs/lora/train") == before


def test_adapters_without_a_start_or_with_sharded_weights_are_refused(autoencoder_folder: str) -> None:
    with pytest.raises(ValidationError, match="lora needs start_from"):
        recipe_of(autoencoder_folder, start_from="")
    with pytest.raises(ValidationError, match="zero_stage 0, 1 and 2"):
        recipe_of(autoencoder_folder, zero_stage=3)
