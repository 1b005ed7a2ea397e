"""The arithmetic of the capacity plan, compared with hand-computed numbers for a thousand rows."""

from dataclasses import replace

import pytest

from pipeline.capacity import (
    DataSizes,
    Inputs,
    LinearityCheck,
    Machines,
    PartitionShares,
    Prices,
    Rate,
    Sizes,
    StageEstimates,
    StageNeed,
    cost,
    used_rates,
)
from pipeline.pictures.near_copy_shards import ROWS_PER_GROUP
from pipeline.recipe import NeighborsConfig
from retrieval.errors import UserError
from retrieval.recipe import IndexConfig

VALUES = {
    "filter_cpu": 2.0,
    "filter_read": 100.0,
    "text": 50.0,
    "fetch_cpu_database": 1000.0,
    "fetch_cpu_train": 3000.0,
    "fetch_bytes_database": 10_000.0,
    "fetch_bytes_train": 70_000.0,
    "image_database": 4000.0,
    "image_train": 9000.0,
    "embed_gpu": 20.0,
    "decode_cpu_database": 500.0,
    "decode_cpu_train": 700.0,
    "near_copy_pair": 5.0,
    "index_cpu": 300.0,
    "index_bytes": 2000.0,
    "match_cpu": 5.0,
    "product_cpu": 1e6,
    "gpu_flops": 1e9,
    "match_share": 0.5,
    "gpu_read": 1e4,
}
DATA = DataSizes(metadata=1000, train=200, database=600, edge=192, dim=384)
INDEX = IndexConfig(rows_per_partition=100)


@pytest.fixture
def inputs() -> Inputs:
    machine = {"count": 2, "cpus": 4, "gbit_s": 1.0, "source": "assumed"}
    return Inputs(
        sizes=Sizes(metadata_rows=1000, database_images=600, training=()),
        rates={name: Rate(value=value, unit="u", source="assumed") for name, value in VALUES.items()},
        machines={
            "cpu": Machines(**machine, gpus=0, dollars_per_hour=3.0),
            "gpu": Machines(**machine, gpus=5, dollars_per_hour=10.0),
        },
        prices=Prices(storage_dollars_per_tb_month=20.0),
    )


@pytest.fixture
def estimates(inputs: Inputs) -> StageEstimates:
    return StageEstimates(inputs, DATA)


def test_filter_reads_the_metadata_twice_and_stores_its_texts(estimates: StageEstimates) -> None:
    need = estimates.filter()
    assert need.kept == 1000 * 50
    assert need.scratch == 1000 * 16.5
    assert need.read == 2 * 1000 * 100 + 2 * 1000 * 16.5
    assert need.cpu_s == pytest.approx(1000 * 2e-6)


def test_hashes_of_database_images_are_compared_with_those_of_training_images(inputs: Inputs) -> None:
    need = StageEstimates(inputs, DATA._replace(database=2 * ROWS_PER_GROUP)).near_copies()
    assert need.kept == 24 * (2 * ROWS_PER_GROUP + 200)
    assert need.read == 24 * (2 * ROWS_PER_GROUP + 200) + 24 * 2 * 200
    assert need.cpu_s == pytest.approx(2 * ROWS_PER_GROUP * 200 * 5e-12)


def test_download_requests_every_url_and_stores_images_by_area(estimates: StageEstimates) -> None:
    need = estimates.download()
    assert need.fetched == 200 * 70_000 + 800 * 10_000
    assert need.cpu_s == pytest.approx(200 * 3e-3 + 800 * 1e-3)
    assert need.kept == 600 * 4000 / 4 + 200 * 9000 + 1000 * 50  # 192 px are a quarter of 384 px


def test_embed_stores_a_float16_vector_an_image(estimates: StageEstimates) -> None:
    need = estimates.embed()
    assert need.kept == 800 * (2 * 384 + 50)
    assert need.gpu_s == 800 / 20
    assert need.cpu_s == pytest.approx(200 * 7e-4 + 600 * 5e-4)


def test_index_scales_with_the_dimension_and_the_partitions(estimates: StageEstimates) -> None:
    need = estimates.index(INDEX)
    assert need.kept == 600 * (2000 / 2 + 50)
    assert need.scratch == 600 * (768 + 50)
    assert need.cpu_s == pytest.approx(600 * 3e-4 / 2 + 2 * 600 * 384 * 6 / 1e6)


def test_neighbors_on_cpus_need_time_for_lists_routing_and_recall(estimates: StageEstimates) -> None:
    need = estimates.neighbors(
        NeighborsConfig(k=3, partitions_per_query=2, lists_per_partition=7, recall_sample=10), INDEX
    )
    row = 3 * (768 + 16)
    assert need.kept == 200 * (row + 8)
    assert need.scratch == 200 * 2 * (768 + 8 + row + 16)
    matched, routed, checked = 200 * 2 * 7 * 5e-6 / 2, 2 * 200 * 384 * 6 / 1e6, 2 * 10 * 384 * 600 / 1e6
    assert need.cpu_s == pytest.approx(matched + routed + checked)
    assert need.gpu_s == 0


def test_neighbors_of_all_partitions_compare_every_pair(estimates: StageEstimates) -> None:
    need = estimates.neighbors(NeighborsConfig(k=3, recall_sample=0), INDEX)
    assert need.cpu_s == pytest.approx(2 * 200 * 384 * 6 / 1e6 + 2 * 200 * 384 * 600 / 1e6)


def test_neighbors_on_gpus_take_the_slower_of_reading_and_computing(estimates: StageEstimates) -> None:
    need = estimates.neighbors(
        NeighborsConfig(k=3, partitions_per_query=2, recall_sample=0, gpus_per_worker=1.0), INDEX
    )
    computing = 2 * 200 * 2 * 384 * 100 / (1e9 * 0.5)
    reading = (800 * (768 + 50) + 200 * 2 * (768 + 8 + 3 * 784 + 16)) / 1e4
    assert need.gpu_s == pytest.approx(max(computing, reading))


def test_a_goal_for_the_recall_is_planned_with_the_measured_shares_and_says_so(inputs: Inputs) -> None:
    shares = PartitionShares(partitions=50, visited=(1, 2, 4), shares=(0.5, 0.8, 0.96), source="measured: there")
    estimates = StageEstimates(inputs.model_copy(update={"partitions": shares}), DATA)
    fixed = estimates.neighbors(NeighborsConfig(k=3, partitions_per_query=4), INDEX)
    planned = estimates.neighbors(NeighborsConfig(k=3, min_recall=0.95), INDEX)
    assert replace(planned, assumed="", read=planned.read - 600 * 768) == fixed
    assert planned.assumed.startswith("neighbors.min_recall = 0.95: 4 of 6 partitions a query are assumed")
    assert "Of 50 partitions, 4 hold 0.960 of the true neighbors (measured: there)" in planned.assumed
    with pytest.raises(UserError, match=r"0.99 cannot be planned: 4 of 50 partitions hold 0.960 \(measured: there\)"):
        estimates.neighbors(NeighborsConfig(min_recall=0.99), INDEX)
    with pytest.raises(UserError, match=r"no \[partitions\]"):
        StageEstimates(inputs, DATA).neighbors(NeighborsConfig(min_recall=0.5), INDEX)


def test_the_bottleneck_sets_the_hours_and_the_price(inputs: Inputs) -> None:
    slow_cpu = cost(StageNeed("a", (), cpu_s=8 * 3600 * 5), inputs)
    assert (slow_cpu.machines, slow_cpu.bound, slow_cpu.hours) == ("cpu", "CPU", pytest.approx(5))
    assert slow_cpu.dollars == pytest.approx(5 * 2 * 3.0)
    slow_gpu = cost(StageNeed("b", (), cpu_s=8 * 3600, gpu_s=10 * 3600 * 2), inputs)
    assert (slow_gpu.machines, slow_gpu.bound, slow_gpu.hours) == ("gpu", "GPU", pytest.approx(2))
    bytes_an_hour = 2 * 1e9 / 8 * 3600
    slow_network = cost(
        StageNeed("c", (), kept=bytes_an_hour, scratch=bytes_an_hour, read=bytes_an_hour, fetched=1), inputs
    )
    assert (slow_network.bound, slow_network.hours) == ("network", pytest.approx(3))


def test_each_need_names_its_rates(estimates: StageEstimates, inputs: Inputs) -> None:
    needs = [estimates.filter(), estimates.embed()]
    assert needs[0].rates == ("text", "filter_read", "filter_cpu")
    assert "filter_cpu" not in needs[1].rates
    assert [name for name, _ in used_rates(needs, inputs)][:3] == ["filter_cpu", "filter_read", "text"]


def test_a_missing_rate_is_an_error_that_names_it(inputs: Inputs) -> None:
    without = inputs.model_copy(update={"rates": {}})
    with pytest.raises(UserError, match=r"\[rates.text\]"):
        StageEstimates(without, DATA).filter()


def test_a_rate_needs_a_source_and_a_check_as_many_values_as_sizes() -> None:
    with pytest.raises(ValueError, match="source"):
        Rate(value=1.0, unit="u", source="unknown")
    with pytest.raises(ValueError, match="2 sizes but 1 values"):
        LinearityCheck(what="w", sizes=(1, 2), values=(1.0,))
