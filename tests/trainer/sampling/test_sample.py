"""The stage sample on a root with a tiny trained model."""

import json
import logging
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.index.hidden import hide
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.updates.delete import delete_from_database
from tests.trainer.tiny_run import PROMPTS, pictures_of, write_clip, write_run, write_style_database
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.resumable import Part
from trainer.sampling.sample import draw_part, make_requests, run
from trainer.sampling.sampler import Sampler, TrainedModel

STAGE = "runs/tiny/sample"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, TrainedModel]:
    return write_run(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def fresh(tiny) -> tuple[Root, TrainedModel]:
    tiny[0].delete(STAGE)
    return tiny


def config(**settings) -> SampleConfig:
    defaults = {"prompts": PROMPTS[:2], "databases": ("deep_red", "green"), "images_per_prompt": 2, "k": 4}
    quick = {"steps": 2, "guidance": 2.0, "batch_size": 3, "workers": 2, "threads": 1, "device": "cpu"}
    return SampleConfig(**(defaults | quick | settings))


def sample(tiny, **settings):
    root, trained = tiny
    return run(config(**settings), trained, root)


def sample_again(tiny, **settings):
    """With --remake."""
    root, trained = tiny
    return run(config(**settings), trained, Root(root.url, remake=True))


def written(root: Root) -> dict[str, int]:
    """Modification time of each file of the stage."""
    return {name: root.local_path(name).stat().st_mtime_ns for name in root.list(STAGE)}


def test_every_prompt_and_database_has_its_pictures_with_recipe_and_neighbors(fresh):
    root, _ = fresh
    manifest = sample(fresh, seed=5)
    pngs = [name for name in manifest.checksums() if "/0" in name and name.endswith(".png")]
    assert len(pngs) == 2 * 2 * 2
    assert sorted([*manifest.checksums(), f"{STAGE}/manifest.json"]) == [
        name for name in root.list(STAGE) if "/records/" not in name and not name.endswith("started.json")
    ]
    with root.open(f"{STAGE}/green/0001-01.png") as file:
        recipe = read_recipe(file.read())
    details = root.read_json(f"{STAGE}/green/0001-01.json")
    assert (recipe["prompt"], recipe["database"], recipe["seed"]) == (PROMPTS[1], "green", 6)
    assert {key: recipe[key] for key in ("k", "guidance", "steps", "scheduler", "mode")} == {
        "k": 4,
        "guidance": 2.0,
        "steps": 2,
        "scheduler": "ddim",
        "mode": "text_and_neighbors",
    }
    assert recipe["neighbors"] == [[row["image_id"], row["similarity"]] for row in details["neighbors"]]
    assert all("green" in row["url"] and row["caption"] for row in details["neighbors"])
    assert recipe["model"] in read_manifest(root, "runs/tiny/train").checksums().values()


def test_the_grid_has_a_row_for_each_picture_of_a_prompt_and_a_column_for_each_database(fresh):
    sample(fresh)
    with fresh[0].open(f"{STAGE}/grid.png") as file:
        four = np.asarray(Image.open(file)).shape
    sample_again(fresh, databases=("green",), images_per_prompt=1)
    with fresh[0].open(f"{STAGE}/grid.png") as file:
        two = np.asarray(Image.open(file)).shape
    cell = four[1] - two[1]
    assert cell > 160, "one column less"
    assert four[0] - two[0] == pytest.approx(2 * cell, abs=4), "two rows less"


def test_running_again_does_nothing(fresh):
    sample(fresh)
    before = written(fresh[0])
    sample(fresh, batch_size=2)
    assert written(fresh[0]) == before


def test_a_deleted_picture_is_drawn_again(fresh):
    root, _ = fresh
    complete = sample(fresh).checksums()
    root.delete(f"{STAGE}/green/0001-01.png")
    assert sample(fresh).checksums() == complete
    assert root.exists(f"{STAGE}/green/0001-01.png")


def test_an_interrupted_run_ends_with_the_checksums_of_an_uninterrupted_one(fresh):
    root, _ = fresh
    complete = sample(fresh).checksums()
    root.delete(f"{STAGE}/manifest.json")
    root.delete(f"{STAGE}/records/0003-00001.json")
    root.delete(f"{STAGE}/green/0001-01.png")
    before = written(root)
    assert sample(fresh).checksums() == complete
    after = written(root)
    unchanged = [name for name in before if after[name] == before[name]]
    assert f"{STAGE}/records/0003-00000.json" in unchanged
    assert 0 < len([name for name in unchanged if name.endswith(".png")]) < 8


def test_a_run_resumed_with_larger_batches_draws_all_missing_pictures(fresh):
    root, _ = fresh
    complete = set(sample(fresh).checksums())
    last = f"{STAGE}/records/0003-00002.json"
    missing = [file["name"] for file in root.read_json(last)["files"]]
    for name in [f"{STAGE}/manifest.json", last, *missing]:
        root.delete(name)
    assert set(sample(fresh, batch_size=8).checksums()) == complete
    assert all(root.exists(name) for name in missing)


def test_other_settings_delete_the_old_pictures_only_on_request(fresh):
    root, _ = fresh
    old = sample(fresh)
    before = written(root)
    with pytest.raises(UserError, match=r"made with .*guidance = 2.0, the recipe has 3.0.*kept.*--remake"):
        sample(fresh, databases=("sky_blue",), guidance=3.0)
    assert written(root) == before
    new = sample_again(fresh, databases=("sky_blue",), guidance=3.0)
    assert new.fingerprint != old.fingerprint
    assert not root.exists(f"{STAGE}/green")
    assert root.exists(f"{STAGE}/sky_blue/0000-00.png")


def test_a_rebuilt_database_is_sampled_again(fresh):
    root, _ = fresh
    old = sample(fresh).fingerprint
    name = "databases/green/manifest.json"
    manifest = root.read_json(name)
    try:
        root.write_json(name, manifest | {"fingerprint": "another"})
        assert sample_again(fresh).fingerprint != old
    finally:
        root.write_json(name, manifest)


def test_a_database_with_deleted_rows_is_sampled_again(tmp_path):
    root, _ = run_in = write_run(tmp_path)
    sample(run_in)
    used = [row["image_id"] for row in root.read_json(f"{STAGE}/green/0000-00.json")["neighbors"]]
    delete_from_database(root.child("databases/green"), used)
    with pytest.raises(UserError, match=r"database/green.*--remake"):
        sample(run_in)
    sample_again(run_in)
    found = [row["image_id"] for row in root.read_json(f"{STAGE}/green/0000-00.json")["neighbors"]]
    assert len(found) == 4
    assert not set(used) & set(found)


def test_pictures_with_images_that_are_hidden_later_are_sampled_again(tmp_path):
    root, _ = run_in = write_run(tmp_path)
    sample(run_in)
    used = [row["image_id"] for row in root.read_json(f"{STAGE}/green/0000-00.json")["neighbors"]]
    hide(root.child("databases/green"), used)
    with pytest.raises(UserError, match=r"from another list of hidden images in databases/green.*--remake"):
        sample(run_in)
    sample_again(run_in)
    found = [row["image_id"] for row in root.read_json(f"{STAGE}/green/0000-00.json")["neighbors"]]
    assert len(found) == 4
    assert not set(used) & set(found)
    files = written(root)
    sample(run_in)
    assert written(root) == files


def test_prompts_that_clip_reads_in_part_are_a_warning(fresh, caplog):
    with caplog.at_level(logging.WARNING):
        sample(fresh, prompts=("a stag", "stag " * 20), databases=("green",), images_per_prompt=1)
    assert "first 16 tokens, start and end included, of 1 of 2 texts, such as 'stag stag" in caplog.text


def test_a_prompt_of_several_plans_is_one_warning(tiny, caplog):
    sampler = Sampler.open(*tiny, config())
    requests = [config().request(text, 0, "text", "") for text in ("a stag", "stag " * 20, "oak " * 20)]
    for planned in (requests[:2], requests[:2], requests):
        sampler.plan(planned)
    warnings = [record.getMessage() for record in caplog.records if record.name == "sample"]
    first, second = [warning.partition(" of ")[2] for warning in warnings]
    assert first.startswith("1 of 2 texts, such as 'stag stag ")
    assert second == "this text: the rest has no effect."


def test_a_mix_is_one_column_with_neighbors_of_every_database(fresh):
    sample(fresh, mix={"deep_red": 2.0, "green": 1.0}, databases=("nowhere",))
    neighbors = fresh[0].read_json(f"{STAGE}/mix/0001-01.json")["neighbors"]
    expected = [("deep_red", 2 / 3)] * 4 + [("green", 1 / 3)] * 4
    assert [(row["database"], row["weight"]) for row in neighbors] == expected


def test_a_changed_image_is_sampled_again(fresh, tmp_path):
    fingerprints = set()
    for style in ("green", "sky_blue"):
        pictures_of(style)[0].save(tmp_path / "image.png")
        settings = {"images": (str(tmp_path / "image.png"),), "prompts": (), "images_per_prompt": 1}
        fingerprints.add(sample_again(fresh, **settings).fingerprint)
    assert len(fingerprints) == 2


def test_mode_text_needs_no_database(fresh):
    manifest = sample(fresh, mode="text", databases=("nowhere",))
    assert f"{STAGE}/text/0000-00.png" in manifest.checksums()
    assert fresh[0].read_json(f"{STAGE}/text/0000-00.json")["neighbors"] == []


def test_a_missing_database_is_refused_before_pictures_are_deleted(fresh):
    sample(fresh)
    before = written(fresh[0])
    with pytest.raises(UserError, match="no database 'nowhere'"):
        sample(fresh, databases=("green", "nowhere"))
    assert written(fresh[0]) == before


def test_a_database_of_another_encoder_is_refused_before_pictures_are_deleted(fresh, tmp_path):
    root, _ = fresh
    sample(fresh)
    before = written(root)
    write_style_database(root, "databases/foreign", Encoder(write_clip(tmp_path / "clip", seed=5)), ["green"])
    try:
        with pytest.raises(UserError, match="was built with"):
            sample(fresh, databases=("green", "foreign"))
    finally:
        root.delete("databases/foreign")
    assert written(root) == before


def test_prompts_come_from_the_recipe_and_from_a_file(fresh, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\na red square\n")
    both = config(prompts_file=str(path))
    assert both.all_prompts() == (*PROMPTS[:2], "a red square")
    with pytest.raises(UserError, match="no prompt"):
        config(prompts=()).all_prompts()


def test_a_strength_without_a_picture_to_start_from_is_refused():
    with pytest.raises(UserError, match="strength have no effect without a picture"):
        config(strength=0.4).request_for("a", 0, "green").check()
    config().request_for("a", 0, "green").check()


def test_picture_n_has_the_same_seed_for_every_prompt_and_database():
    requests = make_requests(config(seed=10), PROMPTS[:2], {})
    assert {(named.name[-2:], named.request.seed) for named in requests} == {("00", 10), ("01", 11)}


def test_too_many_steps_are_refused_before_pictures_are_deleted(fresh):
    sample(fresh)
    before = written(fresh[0])
    with pytest.raises(UserError, match="must be 1 to 1000"):
        sample(fresh, steps=1001)
    assert written(fresh[0]) == before


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"steps": 0}, {"scheduler": "heun"}, {"databases": ()}, {"mode": "image"}, {"colour": 1}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        config(**settings)


def test_lists_of_a_toml_recipe_become_tuples():
    assert SampleConfig.model_validate({"prompts": ["a"], "databases": ["green"]}).databases == ("green",)


def test_batch_size_threads_and_device_do_not_change_the_fingerprint_and_precision_does():
    fast = config(batch_size=8, workers=1, threads=2, device="auto")
    assert json.dumps(fast.output_fields()) == json.dumps(config().output_fields())
    assert config(precision="bf16").output_fields() != config().output_fields()


def test_a_run_in_an_object_store_gives_the_same_pictures(fresh):
    root, trained = fresh
    remote = Root("memory://sampled-run")
    for name in root.list(""):
        remote.write_bytes(name, root.read_bytes(name))
    assert run(config(), trained, remote).checksums() == sample(fresh).checksums()


def test_parts_that_other_processes_draw_give_the_same_files(fresh, caplog):
    root, trained = fresh
    alone = sample(fresh).checksums()
    root.delete(STAGE)
    caplog.clear()

    def distribute(_: object) -> None:
        for number in (2, 0, 1):
            draw_part(config(workers=1), trained, root, Part(number, 3))

    caplog.clear()
    with caplog.at_level(logging.INFO):
        manifest = run(config(), trained, root, distribute)
    assert manifest.checksums() == alone
    assert [message.split(" images")[0] for message in caplog.messages if "images/s" in message] == [
        "sample: 3",
        "sample: 3",
        "sample: 2",
        "sample: 0",
    ]


def test_a_process_that_sees_other_prompts_draws_no_part(fresh, tmp_path):
    root, trained = fresh
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS[0])
    settings = config(prompts=(), prompts_file=str(file), databases=("green",))

    def distribute(_: object) -> None:
        file.write_text(PROMPTS[1])
        draw_part(settings, trained, root, Part(0, 1))

    with pytest.raises(UserError, match=r"sample was begun from another prompts.*the same files"):
        run(settings, trained, root, distribute)
    assert root.list(STAGE) == [f"{STAGE}/started.json"]


def test_a_process_writes_nothing_into_a_stage_that_was_begun_anew(fresh, monkeypatch):
    root, trained = fresh
    opened, started = Sampler.open, f"{STAGE}/started.json"

    def begin_anew(*arguments: object) -> Sampler:
        root.write_json(started, root.read_json(started) | {"fingerprint": "another"})
        return opened(*arguments)

    def distribute(_: object) -> None:
        monkeypatch.setattr(Sampler, "open", begin_anew)
        draw_part(config(), trained, root, Part(0, 1))

    with pytest.raises(UserError, match="sample was begun by another version"):
        run(config(), trained, root, distribute)
    assert root.list(STAGE) == [started]
    root.delete(STAGE)
    with pytest.raises(UserError, match="sample was not begun"):
        draw_part(config(), trained, root, Part(0, 1))


def test_a_file_that_is_replaced_while_the_model_is_loaded_is_not_read_again(fresh, tmp_path, monkeypatch):
    root, path, opened = fresh[0], tmp_path / "start.png", Sampler.open
    pictures_of("green")[0].save(path)
    first = sha256(path.read_bytes()).hexdigest()

    def replace(*arguments: object) -> Sampler:
        pictures_of("sky_blue")[0].save(path)
        return opened(*arguments)

    monkeypatch.setattr(Sampler, "open", replace)
    manifest = sample(fresh, init_image=str(path), mode="text", prompts=PROMPTS[:1], images_per_prompt=1)
    assert manifest.upstream["init_image"] == first[:16]
    assert root.read_json(f"{STAGE}/text/0000-00.json")["init_image"]["sha256"] == first
