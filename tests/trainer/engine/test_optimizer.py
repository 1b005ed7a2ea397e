"""Groups of parameters by name, settings of AdamW, and the learning rate by values."""

import math

import pytest

from tests.trainer.training_set import make_recipe
from trainer.engine.optimizer import learning_rate_at, make_optimizer, parameter_groups
from trainer.model.unet import build_unet
from trainer.recipe import TrainConfig


def config_of(**changes: object) -> TrainConfig:
    return make_recipe("", **changes).train


def rates(**changes: object) -> list[float]:
    config = config_of(learning_rate=1.0, warmup_steps=2, steps=6, **changes)
    return [learning_rate_at(config, step) for step in range(8)]


def test_the_learning_rate_rises_then_stays_or_decays_to_its_final_value() -> None:
    assert rates() == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert rates(learning_rate_decay="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates(learning_rate_decay="linear", final_learning_rate=0.2) == pytest.approx(
        [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    )
    half = math.sqrt(0.5) / 2
    assert rates(learning_rate_decay="cosine") == pytest.approx([0.5, 1, 1, 0.5 + half, 0.5, 0.5 - half, 0, 0])


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rate_at(config_of(learning_rate=1.0, warmup_steps=0), 0) == 1
    assert learning_rate_at(config_of(learning_rate=1.0, warmup_steps=6, learning_rate_decay="cosine"), 6) == 1


def test_norms_and_biases_form_a_group_without_weight_decay() -> None:
    unet = build_unet(make_recipe("").model)
    names = {id(weight): name for name, weight in unet.named_parameters()}
    [everything] = parameter_groups(unet, config_of(weight_decay=0.1))
    assert [names[id(weight)] for weight in everything["params"]] == list(names.values())
    decayed, others = parameter_groups(unet, config_of(weight_decay=0.1, decay_norms_and_biases=False))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    for weight in others["params"]:
        assert names[id(weight)].endswith(".bias") or "norm" in names[id(weight)]
    kept = [names[id(weight)] for weight in decayed["params"]]
    assert kept == [name for name in names.values() if not name.endswith(".bias") and "norm" not in name]
    assert "conv_in.weight" in kept
    assert len(kept) + len(others["params"]) == len(names)


def test_the_optimizer_has_the_recipes_settings() -> None:
    unet = build_unet(make_recipe("").model)
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6, "weight_decay": 0.3}
    [group] = make_optimizer(unet, config_of(**changes)).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.3)
    [group] = make_optimizer(unet, config_of()).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
