"""The capacity command: the recipe's own settings, rates that agree with the benchmarks, a page of both."""

import json
from pathlib import Path

import pytest

from jobs.capacity.__main__ import INPUTS, costs, data_of, main, need_of, read_inputs, training_need
from jobs.capacity.page import page, table
from jobs.cli.recipe import Recipe, load_recipe
from pipeline.capacity import Cost, Inputs
from retrieval.errors import UserError
from trainer.recipe import TrainConfig

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = REPOSITORY / "jobs" / "configs"


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return read_inputs(INPUTS)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(CONFIGS / "laion2b.toml", overrides)


def needs(found: list[Cost]) -> dict[str, Cost]:
    return {one.need.stage: one for one in found}


def test_training_is_reckoned_by_hand_from_steps_batch_and_parameters(inputs: Inputs) -> None:
    train = TrainConfig(
        name="t", source="latents", size=64, k=3, global_batch=10, micro_batch=5, steps=1000,
        checkpoint_every=100, keep_checkpoints=2,
    )  # fmt: skip
    need = need_of(train, (5e9, 7_000_000, 64), inputs, data_of(recipe(), inputs))
    assert need.gpu_s == pytest.approx(10_000 * 5e9 / (312e12 * 0.25))
    assert need.kept == 7_000_000 * (2 * 16 + 4)
    assert need.scratch == 7_000_000 * 16 * 8
    assert need.read == 10_000 * (2 * 2 * 64 + 3 * 2 * 768)


def test_images_encoded_on_the_way_cost_more_than_latents(inputs: Inputs) -> None:
    train = load_recipe(CONFIGS / "train_laion_256.toml")[TrainConfig]
    data = data_of(recipe(), inputs)
    latents = need_of(train.model_copy(update={"source": "latents"}), (1e9, 1, 1), inputs, data)
    assert need_of(train, (1e9, 1, 1), inputs, data).gpu_s == pytest.approx(1.4 * latents.gpu_s)


def test_the_papers_network_has_its_operations_and_parameters(inputs: Inputs) -> None:
    need = training_need(load_recipe(CONFIGS / "train_laion_256.toml"), inputs, data_of(recipe(), inputs))
    assert need.kept == 1_335_480_400 * (3 * 16 + 4)
    assert need.gpu_s == pytest.approx(275_000 * 1600 * 216.3e9 * 1.4 / (312e12 * 0.25), rel=0.01)


def test_the_recipes_settings_move_the_plan(inputs: Inputs) -> None:
    plain = needs(costs(recipe(), inputs, []))
    half = needs(costs(recipe("filter.max_train=50_000_000"), inputs, []))
    assert half["neighbors"].need.kept == plain["neighbors"].need.kept / 2
    wider = needs(costs(recipe("neighbors.k=16"), inputs, []))
    assert wider["neighbors"].need.kept > 1.9 * plain["neighbors"].need.kept
    smaller = needs(costs(recipe("clip.model=ViT-B-32-quickgelu"), inputs, []))
    assert smaller["index"].need.scratch < plain["index"].need.scratch
    larger = needs(costs(recipe("download.database_edge=448"), inputs, []))
    grown = larger["download"].need.kept - plain["download"].need.kept
    assert grown == pytest.approx(1.9e9 * 40_300 * (448**2 - 224**2) / 384**2)


def test_a_training_set_without_a_size_is_refused(inputs: Inputs) -> None:
    with pytest.raises(UserError, match="max_train"):
        data_of(recipe("filter.max_train=0"), inputs)


def test_measured_rates_are_those_of_the_benchmarks(inputs: Inputs) -> None:
    ours = json.loads((REPOSITORY / "docs" / "capacity.json").read_text())
    engine = json.loads((REPOSITORY / "docs" / "performance.json").read_text())["scale"]
    largest, index = ours["filter"][-1], engine[-1]
    measured = {
        "filter_cpu": largest["cpu_us_a_row"],
        "filter_read": largest["bytes_read_a_row"],
        "text": largest["bytes_written_a_row_kept"],
        "decode_cpu_database": ours["decode_cpu_us"]["database"],
        "decode_cpu_train": ours["decode_cpu_us"]["train"],
        "index_cpu": 1e6 * index["build_cpu_s"] / index["rows"],
        "index_bytes": index["bytes"] / index["rows"],
        "match_cpu": index["cpu_us"] / index["join_effort"][1],
    }
    for name, value in measured.items():
        assert inputs.rate(name) == pytest.approx(value, rel=0.01), name
    filtered, built, joined = inputs.checks
    assert filtered.values == pytest.approx([point["cpu_us_a_row"] for point in ours["filter"]], rel=0.01)
    assert built.values == pytest.approx([1e6 * one["build_cpu_s"] / one["rows"] for one in engine], rel=0.01)
    assert joined.values == pytest.approx([one["cpu_us"] for one in engine], rel=0.01)


def test_table_and_page_hold_every_stage_and_the_source_of_every_rate(inputs: Inputs) -> None:
    found, data = costs(recipe(), inputs, []), data_of(recipe(), inputs)
    text, written = table(found, inputs, data), page(found, inputs, data, "r.toml")
    assert max(map(len, text.splitlines())) <= 110
    for one in found:
        assert one.need.stage in text
        assert f"| {one.need.stage} |" in written
        for name in one.need.rates:
            assert inputs.rates[name].source in text
            assert inputs.rates[name].source in written
    for check in inputs.checks:
        assert f"{check.sizes[0]:,}: {check.values[0]:,}".removesuffix(".0") in written


def test_machines_get_the_same_numbers(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = INPUTS.read_text()
    start = text.index("training = [")
    mine = tmp_path / "capacity.toml"
    mine.write_text(text[:start] + "training = []" + text[text.index("\n", start) :])
    main([str(CONFIGS / "laion2b.toml"), "--json", "--inputs", str(mine), "--page", str(tmp_path / "p.md")])
    stages = json.loads(capsys.readouterr().out)["stages"]
    expected = costs(recipe(), inputs, [])
    assert [one["dollars"] for one in stages] == pytest.approx([one.dollars for one in expected])
    assert (tmp_path / "p.md").read_text().startswith("# What the real sizes take")


def test_inputs_that_are_not_right_are_told(tmp_path: Path) -> None:
    (tmp_path / "capacity.toml").write_text("[sizes]\nmetadata_rows = 0\n")
    with pytest.raises(UserError, match=r"capacity\.toml"):
        read_inputs(tmp_path / "capacity.toml")
