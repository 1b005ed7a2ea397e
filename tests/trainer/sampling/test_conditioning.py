"""Conditioning: mixes of databases, excluded and weighted neighbors, images, pseudo-queries."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import HIDDEN_FOLDER, hide
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.tiny_run import DIM, pictures_of, write_run
from trainer.model.context import unit_rows
from trainer.sampling.denoising import with_token_weights
from trainer.sampling.pseudo_queries import PseudoQueries
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import ImageQuery, Request
from trainer.sampling.sampler import Sampler

COUNTS = {0: 6, 1: 3, 2: 2, 3: 1}
"""Row of the training database: its number of occurrences in the neighbor tables of this file."""


def write_neighbors(root: Root, sampler: Sampler) -> list[int]:
    """Write neighbor tables with the rows of COUNTS. Returns the image ids of these rows."""
    index = sampler.database("index")
    ids, vectors = np.asarray(index.metadata()["image_id"])[:4], index.embeddings()[:4]
    slots = np.concatenate([np.full(count, row) for row, count in COUNTS.items()])
    slots = np.random.default_rng(0).permutation(slots).reshape(6, 2)
    files = []
    for number, part in enumerate((slots[:4], slots[4:])):
        columns = [
            np.arange(len(part)) + 10 * number,
            schema.fixed_lists(ids[part]),
            schema.fixed_lists(np.ones(part.shape, np.float32)),
            schema.fixed_lists(vectors[part].reshape(len(part), -1)),
            schema.fixed_lists(np.ones(part.shape, np.float32)),
        ]
        table_schema = schema.neighbors(2, DIM)
        table = pa.table([pa.array(column) for column in columns], schema=table_schema)
        files.append(schema.write_table(root, f"neighbors/{number:05d}.parquet", table, table_schema))
    shards = tuple(ShardRecord(file.name, 1, (file,)) for file in files)
    write_manifest(root, Manifest("neighbors", 1, "n" * 16, {}, {}, shards, {}, 1.0))
    return [int(id_) for id_ in ids]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> Sampler:
    root, trained = write_run(tmp_path_factory.mktemp("conditioning"))
    return Sampler.open(root, trained, ComputeConfig(device="cpu", workers=1, threads=1))


@pytest.fixture(scope="module")
def retrieved(sampler) -> list[int]:
    return write_neighbors(sampler.root, sampler)


def request(**settings) -> Request:
    return Request(**({"prompt": "a circle", "database": "green", "k": 4, "guidance": 2.0, "steps": 2} | settings))


def conditioned(sampler, **settings):
    (batch,) = sampler.plan([request(**settings)])
    return batch.items[0]


def image_ids(item) -> list[int]:
    return [neighbor.image_id for neighbor in item.neighbors]


def image(sampler, style="sky_blue", number=0):
    buffer = io.BytesIO()
    pictures_of(style)[number].save(buffer, "PNG")
    return sampler.image_query(f"{style}.png", buffer.getvalue())


def pixels(sample) -> np.ndarray:
    return np.asarray(sample.picture).astype(int)


@torch.no_grad()
def test_an_integer_weight_has_the_effect_of_repeating_the_token(sampler):
    rng = torch.Generator().manual_seed(0)
    context = torch.nn.functional.normalize(torch.randn(2, 3, DIM, generator=rng), dim=-1)
    latents, timestep = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor(500)
    repeated = context[:, [0, 1, 1, 1, 2, 2]]

    def predict(unet, tokens):
        return unet(latents, timestep, encoder_hidden_states=tokens, return_dict=False)[0]

    weighted = predict(with_token_weights(sampler.unet, torch.tensor([[1.0, 3.0, 2.0]] * 2)), context)
    effect = (predict(sampler.unet, repeated) - predict(sampler.unet, context)).abs().max()
    # The mask rounds log w to 6e-4.
    assert (weighted - predict(sampler.unet, repeated)).abs().max() < 5e-3 * effect
    unit_weights = with_token_weights(sampler.unet, torch.ones(2, 3))
    assert torch.equal(predict(unit_weights, context), predict(sampler.unet, context))


def test_a_mix_has_k_neighbors_of_each_database_weighted_by_its_share(sampler):
    mixed = conditioned(sampler, mix=(("deep_red", 3.0), ("green", 1.0)))
    assert [neighbor.database for neighbor in mixed.neighbors] == ["deep_red"] * 4 + ["green"] * 4
    np.testing.assert_allclose(mixed.weights, [1] + [0.75] * 4 + [0.25] * 4)
    alone = conditioned(sampler, database="green")
    assert image_ids(mixed)[4:] == image_ids(alone)
    (single,) = sampler.sample([request(database="green")])
    (mix,) = sampler.sample([request(mix=(("green", 5.0),))])
    assert np.array_equal(pixels(single), pixels(mix))


def test_the_weights_of_a_mix_interpolate_between_its_databases(sampler):
    mixes = [(("deep_red", 1.0), ("green", weight)) for weight in (1e-5, 1.0, 1e5)]
    near_red, between, near_green = map(pixels, sampler.sample([request(mix=mix) for mix in mixes]))
    red, green = map(pixels, sampler.sample([request(database=name) for name in ("deep_red", "green")]))
    assert np.abs(near_red - red).max() <= 1
    assert np.abs(near_green - green).max() <= 1
    assert min(np.abs(between - red).max(), np.abs(between - green).max()) > 1


def test_excluded_images_are_replaced_by_the_next_best_and_weights_apply_to_neighbors(sampler):
    first, second, third, *others = image_ids(conditioned(sampler, k=6))
    changed = conditioned(sampler, exclude=(first, third, 1), weights=((second, 0.0),))
    assert image_ids(changed) == others
    half = conditioned(sampler, weights=((second, 0.5),))
    np.testing.assert_array_equal(half.weights, [1, 1, 0.5, 1, 1])
    fainter = conditioned(sampler, weights=((second, 0.5),), neighbor_weight=0.5)
    np.testing.assert_array_equal(fainter.weights, [1, 0.5, 0.25, 0.5, 0.5])
    assert half.neighbors[1].weight == 0.5
    with pytest.raises(UserError, match="set a weight above 0"):
        conditioned(sampler, mode="neighbors", k=1, weights=((first, 0.0),))


def test_images_are_tokens_of_the_context_and_their_mean_is_the_query(sampler):
    first, second = image(sampler), image(sampler, "deep_red", 3)
    item = conditioned(sampler, prompt="", images=(first, second), database="index")
    units = unit_rows(np.stack([first.embedding, second.embedding]))
    np.testing.assert_allclose(item.context[:2], units, atol=1e-6)
    database = sampler.database("index")
    scores = database.embeddings().astype(np.float32) @ units.sum(axis=0)
    best = np.asarray(database.metadata()["image_id"])[np.argsort(-scores)[:4]]
    assert image_ids(item) == best.tolist()
    assert len(conditioned(sampler, images=(first,), mode="text").context) == 2
    assert len(conditioned(sampler, images=(first,), mode="neighbors").context) == 4


def test_pseudo_queries_are_drawn_with_the_frequency_of_retrieval_in_training(sampler, retrieved):
    draws = PseudoQueries(sampler.root)
    drawn = [draws.draw(seed)[0] for seed in range(600)]
    rates = [drawn.count(id_) / 600 for id_ in retrieved]
    np.testing.assert_allclose(rates, np.array([*COUNTS.values()]) / 12, atol=0.06)
    assert {draws.draw(seed, top_m=0.5)[0] for seed in range(60)} == set(retrieved[:2])
    assert {draws.draw(seed, top_m=0.01)[0] for seed in range(9)} == {retrieved[0]}
    index = sampler.database("index")
    stored = index.embeddings()[np.asarray(index.metadata()["image_id"]) == draws.draw(5)[0]][0]
    np.testing.assert_allclose(draws.draw(5)[1], stored, atol=1e-3)


def test_a_hidden_image_is_never_drawn(sampler, retrieved):
    index = sampler.root.child("index")
    hide(index, [retrieved[0]])
    try:
        draws = PseudoQueries(sampler.root)
        assert retrieved[0] not in {draws.draw(seed)[0] for seed in range(50)}
    finally:
        index.delete(HIDDEN_FOLDER)


def test_a_sampler_that_runs_draws_no_image_that_is_hidden_later_and_reads_new_tables(sampler, retrieved):
    requests = [request(prompt="", mode="unconditional", seed=seed) for seed in range(50)]
    drawn = [{item.pseudo_query for batch in sampler.plan(requests) for item in batch.items}]
    index = sampler.root.child("index")
    hide(index, [retrieved[0]])
    try:
        drawn.append({item.pseudo_query for batch in sampler.plan(requests) for item in batch.items})
    finally:
        index.delete(HIDDEN_FOLDER)
    assert drawn == [set(retrieved), set(retrieved[1:])]

    tables = read_manifest(sampler.root, "neighbors")
    try:
        sampler.root.delete("neighbors/00001.parquet")
        write_manifest(sampler.root, dataclasses.replace(tables, shards=tables.shards[:1], fingerprint="m" * 16))
        assert sampler.plan(requests)
    finally:
        write_neighbors(sampler.root, sampler)


def test_mode_unconditional_conditions_only_on_neighbors_of_a_pseudo_query(sampler, retrieved):
    item = conditioned(sampler, prompt="", mode="unconditional", database="index", seed=3)
    assert item.pseudo_query in retrieved
    assert item.neighbors[0].image_id == item.pseudo_query, "the image is its own nearest neighbor"
    assert len(item.context) == 4
    (sample,) = sampler.sample([request(prompt="", mode="unconditional", seed=3)])
    assert sample.recipe()["pseudo_query"] == item.pseudo_query
    assert {neighbor.database for neighbor in sample.neighbors} == {"green"}


def test_a_recipe_with_all_options_reproduces_its_picture(sampler):
    first, second, *_ = image_ids(conditioned(sampler, k=6))
    original = request(
        images=(image(sampler),),
        mix=(("green", 2.0), ("sky_blue", 1.0)),
        exclude=(first,),
        weights=((second, 2.0),),
        seed=9,
    )
    (sample,) = sampler.sample([original])
    recipe = json.loads(json.dumps(sample.recipe()))
    assert Request.from_recipe(recipe) == original
    assert np.array_equal(pixels(sampler.sample([Request.from_recipe(recipe)])[0]), pixels(sample))
    neighbor = sample.detailed_recipe()["neighbors"][0]
    assert (neighbor["database"], neighbor["weight"], neighbor["details"]["width"]) == ("green", 4 / 3, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "nothing to condition on"),
        ({"mix": (("green", 0.0),)}, "weight above 0"),
        ({"mix": (("green", 1.0), ("green", 2.0))}, "each database once"),
        ({"mix": (("green", float("nan")),)}, "weight above 0"),
        ({"mix": (("nowhere", 1.0),)}, "no database 'nowhere'"),
        ({"weights": ((5, -1.0),)}, "weights of neighbors"),
        ({"top_m": 0.0}, "top_m must be above 0"),
        ({"neighbor_weight": 0.0}, "neighbor_weight must be above 0"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_invalid_requests_are_refused(sampler, settings, message):
    with pytest.raises(UserError, match=message):
        sampler.plan([request(**settings)])


def test_a_file_that_is_no_image_and_a_vector_of_another_encoder_are_refused(sampler):
    with pytest.raises(UserError, match=r"a\.png is not a readable picture"):
        sampler.image_query("a.png", b"nothing")
    short = dataclasses.replace(image(sampler), vector="AAAAAA==")
    with pytest.raises(UserError, match="embedded by another encoder"):
        sampler.plan([request(images=(short,))])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3e38])
def test_an_image_with_a_zero_or_infinite_vector_is_refused(sampler, value):
    with pytest.raises(UserError, match=r"a\.png' is zero or not finite"):
        sampler.plan([request(images=(ImageQuery.from_file("a.png", b"", np.full(DIM, value)),))])


def test_prompt_and_image_have_equal_weight_in_the_query(sampler):
    text = sampler.encoder.encode_texts(["a circle"])[0]
    with pytest.raises(UserError, match="cancel out"):
        sampler.plan([request(images=(ImageQuery.from_file("a.png", b"", -text),))])
    unit = image(sampler)
    scaled = ImageQuery.from_file("scaled", b"", 9 * unit.embedding)
    first, second = (conditioned(sampler, images=(query,)) for query in (unit, scaled))
    assert image_ids(first) == image_ids(second)
    similarities = ([neighbor.similarity for neighbor in item.neighbors] for item in (first, second))
    np.testing.assert_allclose(*similarities, atol=1e-5)


def test_a_prompt_without_images_is_searched_with_the_calibration_of_texts(sampler, monkeypatch):
    search, kinds = Database.search, []

    def recorded(database, *args, **options):
        kinds.append((options["recall"], options["like"]))
        return search(database, *args, **options)

    monkeypatch.setattr(Database, "search", recorded)
    requests = [request(), request(images=(image(sampler),)), request(prompt="", images=(image(sampler),))]
    sampler.plan(requests)
    assert kinds == [(0.95, "images"), (0.95, "texts")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "3"}, "field seed is '3'. Input should be a valid integer"),
        ({"k": 4.5}, "field k is 4.5. Input should be a valid integer"),
        ({"guidance": [2]}, r"field guidance is \[2\]. Input should be a valid number"),
        ({"prompt": 7}, "field prompt is 7. Input should be a valid string"),
        ({"prompt": "a \ud800"}, "a lone surrogate"),
        ({"mode": {}}, "field mode is {}. Input should be 'text_and_neighbors', "),
        ({"scheduler": "magic"}, "field scheduler is 'magic'. Input should be 'ddim'"),
        ({"mix": [["green"]]}, "field mix.0.1 is missing"),
        ({"exclude": 5}, "field exclude is 5. Input should be a valid array"),
        ({"weights": [["5", 1.0]]}, "field weights.0.0 is '5'. Input should be a valid integer"),
        ({"guidance_interval": [0.1, 0.2, 0.3]}, "field guidance_interval is"),
        ({"images": ["a"]}, "field images.0 is 'a'. Input should be an object"),
        ({"init_image": {"name": "a.png"}}, "field init_image.sha256 is missing"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": 10**400}, "guidance must be a finite number, got inf"),
        ({"guidance_interval": [0.0, float("nan")]}, "two increasing numbers"),
        ({"height": 10**400}, "height and width must be at most 16384, got 1000"),
    ],
)
def test_a_recipe_with_a_wrong_value_is_refused_with_the_name_of_its_field(values, message):
    with pytest.raises(UserError, match=message):
        Request.from_recipe(json.loads(json.dumps({"prompt": "a stag"} | values))).check()


def test_an_incomplete_recipe_is_refused():
    with pytest.raises(UserError, match="not the recipe of a sample"):
        Request.from_recipe({"seed": 1})
