"""The capacity command: it uses the recipe's settings, and its rates agree with the benchmarks."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.pipeline import partitions
from jobs.capacity import plan
from jobs.capacity.__main__ import INPUTS, main
from jobs.capacity.plan import Network, costs, data_sizes, latents_need, need_of, read_inputs, training_needs
from jobs.capacity.stored import stored_inputs
from jobs.capacity.tables import page, table
from jobs.cli.recipe import Recipe, load_recipe
from pipeline.capacity import Cost, Inputs
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.recipe import LatentsConfig, TrainConfig
from trainer.tracking.flops import encoding_flops

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = REPOSITORY / "jobs" / "configs"


@pytest.fixture(scope="module", autouse=True)
def networks_built_once() -> Iterator[None]:
    """Recipes share networks, which take seconds to build and to count."""
    with ExitStack() as patches:
        for name in ("build_unet", "training_flops", "encoding_flops"):
            patches.enter_context(patch.object(plan, name, cache(getattr(plan, name))))
        yield


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return read_inputs(INPUTS)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(CONFIGS / "laion2b.toml", overrides)


def by_stage(stages: list[Cost]) -> dict[str, Cost]:
    return {cost.need.stage: cost for cost in stages}


def test_the_need_of_training_follows_from_steps_batch_and_parameters(inputs: Inputs) -> None:
    train = TrainConfig(
        name="t", source="latents", size=64, k=3, global_batch=10, micro_batch=5, steps=1000,
        checkpoint_every=100, keep_checkpoints=2,
    )  # fmt: skip
    network = Network(flops=5e9, parameters=7_000_000, latent_values=64, encoding_flops=1e9)
    need = need_of(train, network, inputs, data_sizes(recipe(), inputs), views=3)
    assert need.gpu_s == pytest.approx(10_000 * 5e9 / (312e12 * 0.25))
    assert need.kept == 7_000_000 * (2 * 16 + 4)
    assert need.scratch == 7_000_000 * 16 * 8
    assert need.read == 10_000 * (3 * 2 * 2 * 64 + 3 * 2 * 768)


def test_training_on_images_costs_more_than_on_latents(inputs: Inputs) -> None:
    train = load_recipe(CONFIGS / "train_laion_256.toml")[TrainConfig]
    data = data_sizes(recipe(), inputs)
    network = Network(1e9, 1, 1, 0.6e9)
    images = need_of(train.model_copy(update={"source": "images"}), network, inputs, data, views=1)
    assert images.gpu_s == pytest.approx(1.6 * need_of(train, network, inputs, data, views=1).gpu_s)


def test_latents_store_and_encode_every_view_and_decode_an_image_once(inputs: Inputs) -> None:
    data = data_sizes(recipe("filter.max_train=1000"), inputs)
    network = Network(flops=1.0, parameters=1, latent_values=64, encoding_flops=5e9)
    need = latents_need(LatentsConfig(size=128, views=3, gpus_per_worker=0.5), network, inputs, data)
    assert need.stage == "latents 128"
    assert need.kept == 1000 * (3 * 2 * 2 * 64 + 8)  # mean and deviation in float16, and an id
    assert need.read == 1000 * 294_100
    assert need.gpu_s == pytest.approx(1000 * 3 * 5e9 / (312e12 * 0.25))
    assert need.cpu_s == pytest.approx(1000 * 14_090e-6)
    on_cpus = latents_need(LatentsConfig(size=128, views=3), network, inputs, data)
    assert (on_cpus.gpu_s, on_cpus.kept) == (0, need.kept)
    assert on_cpus.cpu_s == pytest.approx(1000 * 14_090e-6 + 1000 * 3 * 5e9 / 170e9)


@pytest.mark.parametrize(("size", "gflop"), [(256, 137.9), (768, 1269.8)])
def test_encoding_with_the_papers_autoencoder_takes_the_counted_operations(size: int, gflop: float) -> None:
    assert encoding_flops("kl", size) == pytest.approx(1e9 * gflop, rel=1e-3)


def test_the_papers_network_has_the_expected_flop_and_parameters(inputs: Inputs) -> None:
    loaded = load_recipe(CONFIGS / "train_laion_256.toml")
    latents, need = training_needs(loaded, inputs, data_sizes(recipe(), inputs))
    assert need.kept == 1_335_480_400 * (3 * 16 + 4)
    assert need.gpu_s == pytest.approx(275_000 * 1600 * 216.3e9 / (312e12 * 0.25), rel=0.01)
    assert latents.gpu_s == pytest.approx(100e6 * 4 * 137.9e9 / (312e12 * 0.25), rel=0.01)
    assert latents.kept == 100e6 * (4 * 2 * 2 * 16 * 16 * 16 + 8)


def test_the_plan_depends_on_the_settings_of_the_recipe(inputs: Inputs) -> None:
    plain = by_stage(costs(recipe(), inputs, []))
    half = by_stage(costs(recipe("filter.max_train=50_000_000"), inputs, []))
    assert half["neighbors"].need.kept == plain["neighbors"].need.kept / 2
    wider = by_stage(costs(recipe("neighbors.k=16"), inputs, []))
    assert wider["neighbors"].need.kept > 1.9 * plain["neighbors"].need.kept
    smaller = by_stage(costs(recipe("clip.model=ViT-B-32-quickgelu"), inputs, []))
    assert smaller["index"].need.scratch < plain["index"].need.scratch
    larger = by_stage(costs(recipe("download.database_edge=448"), inputs, []))
    grown = larger["download"].need.kept - plain["download"].need.kept
    assert grown == pytest.approx(1.9e9 * 40_300 * (448**2 - 224**2) / 384**2)


def test_without_a_limit_every_row_of_the_metadata_is_a_training_image(inputs: Inputs) -> None:
    assert data_sizes(recipe("filter.max_train=0"), inputs).train == inputs.sizes.metadata_rows


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_of_the_stages_that_it_has(inputs: Inputs, path: Path) -> None:
    # demo.toml names a CLIP folder that does not exist before the demo ran.
    planned = load_recipe(path)
    stages = costs(planned, inputs, [planned] if planned.has("train") else [])
    sections = {"near copies": "embed"}
    stage_names = ("filter", "download", "near copies", "embed", "index", "neighbors")
    names = [name for name in stage_names if planned.has(sections.get(name, name))]
    if planned.has("train"):
        train = planned[TrainConfig]
        names += [f"latents {train.size}"] if train.source == "latents" else []
        names += [f"train {train.name}"]
    assert [cost.need.stage for cost in stages] == names
    assert all(cost.hours > 0 for cost in stages)


def test_an_unknown_clip_model_without_a_network_is_an_error(inputs: Inputs) -> None:
    with pytest.raises(UserError, match=r"clip.model = 'local-dir:nowhere': its vector length is unknown"):
        data_sizes(recipe("clip.model=local-dir:nowhere"), inputs)


def test_measured_rates_are_those_of_the_benchmarks(inputs: Inputs) -> None:
    capacity = json.loads((REPOSITORY / "docs" / "capacity.json").read_text())
    engine = json.loads((REPOSITORY / "docs" / "performance.json").read_text())["scale"]
    largest, index = capacity["filter"][-1], engine[-1]
    measured = {
        "filter_cpu": largest["cpu_us_a_row"],
        "filter_read": largest["bytes_read_a_row"],
        "text": largest["bytes_written_a_row_kept"],
        "decode_cpu_database": capacity["decode_cpu_us"]["database"],
        "decode_cpu_train": capacity["decode_cpu_us"]["train"],
        "near_copy_pair": json.loads((REPOSITORY / "docs" / "near_copies.json").read_text())["pair_ps"],
        "index_cpu": 1e6 * index["build_cpu_s"] / index["rows"],
        "index_bytes": index["bytes"] / index["rows"],
        "match_cpu": index["cpu_us"] / index["join_effort"][1],
    }
    for name, value in measured.items():
        assert inputs.rate(name) == pytest.approx(value, rel=0.01), name
    filtered, indexed, joined = inputs.checks
    index_us = [1e6 * size["build_cpu_s"] / size["rows"] for size in engine]
    assert filtered.values == pytest.approx([point["cpu_us_a_row"] for point in capacity["filter"]], rel=0.01)
    assert indexed.values == pytest.approx(index_us, rel=0.01)
    assert joined.values == pytest.approx([size["cpu_us"] for size in engine], rel=0.01)


def test_the_shares_of_partitions_are_those_of_the_benchmark_and_the_plan_states_them(inputs: Inputs) -> None:
    measured = [
        result
        for result in json.loads((REPOSITORY / "docs" / "partitions.json").read_text())["results"]
        if result["copies"] == "1 copy"
    ][-1]
    assert inputs.partitions
    assert (inputs.partitions.partitions, inputs.partitions.visited) == (measured["partitions"], partitions.VISITED)
    assert list(inputs.partitions.shares) == measured["shares"]
    stages, data = costs(recipe(), inputs, []), data_sizes(recipe(), inputs)
    stated = "neighbors.min_recall = 0.95: 64 of 1,900 partitions a query are assumed"
    assert stated in " ".join(table(stages, inputs, data).split())
    assert stated in page(stages, inputs, data, "r.toml")


def test_table_and_page_have_every_stage_and_the_source_of_every_rate(inputs: Inputs) -> None:
    stages, data = costs(recipe(), inputs, []), data_sizes(recipe(), inputs)
    text, markdown = table(stages, inputs, data), page(stages, inputs, data, "r.toml")
    assert max(map(len, text.splitlines())) <= 110
    for cost in stages:
        assert cost.need.stage in text
        assert f"| {cost.need.stage} |" in markdown
        for name in cost.need.rates:
            assert inputs.rates[name].source in text
            assert inputs.rates[name].source in markdown
    for check in inputs.checks:
        assert f"{check.sizes[0]:,}: {check.values[0]:,}".removesuffix(".0") in markdown


def without_training(folder: Path) -> Path:
    """A copy of the inputs without the training recipes, whose networks take seconds to build."""
    text = INPUTS.read_text()
    start = text.index("training = [")
    path = folder / "capacity.toml"
    path.write_text(text[:start] + "training = []" + text[text.index("\n", start) :])
    return path


def test_json_has_the_same_numbers(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_inputs = without_training(tmp_path)
    arguments = ["--json", "--inputs", str(own_inputs), "--page", str(tmp_path / "p.md")]
    main([str(CONFIGS / "laion2b.toml"), *arguments])
    stages = json.loads(capsys.readouterr().out)["stages"]
    expected = costs(recipe(), inputs, [])
    assert [stage["dollars"] for stage in stages] == pytest.approx([cost.dollars for cost in expected])
    assert (tmp_path / "p.md").read_text().startswith("# Storage, time and cost at full size")


def test_the_manifests_of_a_run_replace_rates_and_the_plan_names_them(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(stage: str, shards: list[ShardRecord], **values: object) -> None:
        write_manifest(Root(tmp_path), Manifest(stage, 1, "f", {}, {"database_edge": 192}, shards, values, 1.0))

    def tar(split: str, images: int, size: int) -> ShardRecord:
        files = (FileRecord(f"download/{split}/0.tar", size, "0"), FileRecord(f"download/{split}/0.parquet", 9, "0"))
        return ShardRecord(f"{split}/0", images, files, {"http": 10}, seconds=3.0)

    write("filter", [ShardRecord("a", 80, (FileRecord("f", 4_000, "0"),), {"unsafe": 20, "not_sampled": 900})])
    write("download", [tar("train", 20, 6_000_000), tar("database", 50, 500_000)])
    stored = stored_inputs(inputs, Root(tmp_path))
    assert stored.rate("text") == 50
    assert stored.rate("image_train") == 300_000
    assert stored.rate("image_database") == 40_000  # 10,000 bytes at half the edge
    assert stored.rate("fetch_cpu_train") == pytest.approx(50_000)
    assert stored.sizes.database_images == inputs.sizes.metadata_rows // 2
    assert {name for name in inputs.rates if stored.rates[name] == inputs.rates[name]} == {*inputs.rates} - {
        "text",
        "image_train",
        "image_database",
        "fetch_cpu_train",
        "fetch_cpu_database",
    }
    main([str(CONFIGS / "laion2b.toml"), "--stored", str(tmp_path), "--inputs", str(without_training(tmp_path))])
    text = "".join(capsys.readouterr().out.split())  # without the line breaks
    assert f"measured:{tmp_path}/download,50of100rows" in text
    assert f"measured:{tmp_path}/download,20images" in text


def test_the_training_recipes_of_the_inputs_exist(inputs: Inputs) -> None:
    assert len(inputs.sizes.training) == 3
    assert all((INPUTS.parent / name).is_file() for name in inputs.sizes.training)


def test_invalid_inputs_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "capacity.toml").write_text("[sizes]\nmetadata_rows = 0\n")
    with pytest.raises(UserError, match=r"capacity\.toml"):
        read_inputs(tmp_path / "capacity.toml")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("visited = [1, 2,", "visited = [2,", "6 numbers in visited but 7 shares: give one for each"),
        ("visited = [1, 2,", "visited = [2, 1,", r"visited must ascend, got \(2, 1, 4"),
        ("shares = [0.41025,", "shares = [0.6,", r"shares must ascend, got \(0\.6, 0\.56275"),
        ("0.962]", "96.2]", r"shares must be in \[0, 1\], got .*96\.2"),
    ],
)
def test_shares_of_partitions_that_do_not_fit_are_an_error(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    file = tmp_path / "capacity.toml"
    file.write_text(INPUTS.read_text().replace(before, after))
    with pytest.raises(UserError, match=rf"(?s)capacity\.toml has no valid inputs.*partitions.*{message}"):
        read_inputs(file)
