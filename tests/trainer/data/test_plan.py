"""Which settings belong to a run: its checkpoints go on with others of CHANGEABLE, and with no others."""

from dataclasses import replace

import pytest

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.training_set import make_recipe, new_training_set
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import CHANGEABLE, TrainingRecipe

CHANGED = {
    "steps": 9,
    "global_batch": 4,
    "learning_rate": 0.5,
    "learning_rate_decay": "cosine",
    "final_learning_rate": 0.1,
    "warmup_steps": 7,
    "weight_decay": 0.2,
    "decay_norms_and_biases": False,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_eps": 1e-6,
    "max_grad_norm": 0.3,
    "ema_decay": 0.5,
}
OTHERS = [
    ("train", {"min_snr_gamma": 5.0}),
    ("train", {"timestep_sampling": "logit_normal"}),
    ("train", {"ema_widths": (0.05, 0.1)}),
    ("train", {"interleaved_shards": 2}),
    ("train", {"seed": 4}),
    ("model", {"layers": 2}),
    ("diffusion", {"prediction": "v_prediction"}),
    ("diffusion", {"prediction": "v_prediction", "zero_terminal_snr": True}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Root:
    return new_training_set(tmp_path_factory.mktemp("root"), autoencoder_folder)


def test_settings_that_may_change_are_not_part_of_the_identity(root: Root, autoencoder_folder: str) -> None:
    assert set(CHANGED) == CHANGEABLE
    autoencoder = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu")
    plan = make_plan(make_recipe(autoencoder_folder), root, autoencoder)
    for name, value in CHANGED.items():
        changed = make_plan(make_recipe(autoencoder_folder, **{name: value}), root, autoencoder)
        assert changed.checkpoint_identity == plan.checkpoint_identity, name
        assert changed.fingerprint != plan.fingerprint, name


def test_every_other_setting_makes_another_run(root: Root, autoencoder_folder: str) -> None:
    recipe = make_recipe(autoencoder_folder)
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    identities = {make_plan(recipe, root, autoencoder).checkpoint_identity}
    for section, values in OTHERS:
        sections = recipe.model_dump()
        sections[section] |= values
        changed = TrainingRecipe.model_validate(sections)
        identities.add(make_plan(changed, root, autoencoder).checkpoint_identity)
    assert len(identities) == 1 + len(OTHERS)


def test_a_run_starts_only_from_a_model_of_its_own_encoder_and_autoencoder(root: Root, autoencoder_folder: str) -> None:
    recipe = make_recipe(autoencoder_folder, name="second", start_from="first")
    autoencoder, model = Autoencoder.load(recipe.autoencoder, "cpu"), recipe.model.model_dump(mode="json")
    own = {"encoder": read_manifest(root, "neighbors").values["encoder"], "autoencoder": autoencoder.identity}
    first = Manifest("runs/first/train", schema.VERSION, "print", {}, {"model": model}, (), own, 0.0)
    write_manifest(root, first)
    assert make_plan(recipe, root, autoencoder).upstream["start_from"] == "print"
    for name, other in (("encoder", own["encoder"] | {"weights": "1" * 16}), ("autoencoder", "another")):
        write_manifest(root, replace(first, values=own | {name: other}))
        with pytest.raises(UserError, match=rf"runs/first/train was trained with the {name} .*train\.start_from"):
            make_plan(recipe, root, autoencoder)
