"""What a picture is conditioned on: mixes, neighbors left out or weighed, images, pseudo-queries."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import FILE as BLOCKED
from retrieval.index.hidden import block
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from tests.trainer.tiny_run import DIM, pictures_of, write_run
from trainer.sampling.denoising import weighed
from trainer.sampling.pseudo_queries import PseudoQueries
from trainer.sampling.recipe import Compute
from trainer.sampling.request import ImageQuery, Request
from trainer.sampling.sampler import Sampler

SHARES = {0: 6, 1: 3, 2: 2, 3: 1}
"""Rows of the training database, by how often the neighbor tables of this file hold them."""


def write_neighbors(root: Root, sampler: Sampler) -> list[int]:
    """Tables that retrieve four rows of the training database by SHARES; the ids of these rows."""
    index = sampler.database("index")
    ids, vectors = np.asarray(index.metadata()["image_id"])[:4], index.embeddings()[:4]
    slots = np.concatenate([np.full(count, row) for row, count in SHARES.items()])
    slots = np.random.default_rng(0).permutation(slots).reshape(6, 2)
    files = []
    for number, part in enumerate((slots[:4], slots[4:])):
        columns = [
            np.arange(len(part)) + 10 * number,
            schema.fixed_lists(ids[part]),
            schema.fixed_lists(np.ones(part.shape, np.float32)),
            schema.fixed_lists(vectors[part].reshape(len(part), -1)),
        ]
        wanted = schema.neighbors(2, DIM)
        table = pa.table([pa.array(column) for column in columns], schema=wanted)
        files.append(schema.write_table(root, f"neighbors/{number:05d}.parquet", table, wanted))
    shards = tuple(ShardRecord(file.name, 1, (file,)) for file in files)
    write_manifest(root, Manifest("neighbors", 1, "n" * 16, {}, {}, shards, {}, 1.0))
    return [int(one) for one in ids]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> Sampler:
    root, trained = write_run(tmp_path_factory.mktemp("conditioning"))
    return Sampler.open(root, trained, Compute(device="cpu", workers=1, threads=1))


@pytest.fixture(scope="module")
def retrieved(sampler) -> list[int]:
    return write_neighbors(sampler.root, sampler)


def request(**settings) -> Request:
    return Request(
        **({"prompt": "a circle", "database": "green", "k": 4, "guidance": 2.0, "steps": 2} | settings)
    )


def conditioned(sampler, **settings):
    (batch,) = sampler.plan([request(**settings)])
    return batch.items[0]


def image(sampler, style="sky_blue", number=0):
    buffer = io.BytesIO()
    pictures_of(style)[number].save(buffer, "PNG")
    return sampler.image_query(f"{style}.png", buffer.getvalue())


def pixels(sample) -> np.ndarray:
    return np.asarray(sample.picture).astype(int)


@torch.no_grad()
def test_a_token_of_whole_weight_is_a_token_said_as_often(sampler):
    rng = torch.Generator().manual_seed(0)
    context = torch.nn.functional.normalize(torch.randn(2, 3, DIM, generator=rng), dim=-1)
    latents, timestep = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor(500)
    often = context[:, [0, 1, 1, 1, 2, 2]]

    def told(unet, tokens):
        return unet(latents, timestep, encoder_hidden_states=tokens, return_dict=False)[0]

    by_weight = told(weighed(sampler.unet, torch.tensor([[1.0, 3.0, 2.0]] * 2)), context)
    effect = (told(sampler.unet, often) - told(sampler.unet, context)).abs().max()
    # the mask rounds log w to 6e-4
    assert (by_weight - told(sampler.unet, often)).abs().max() < 5e-3 * effect
    assert torch.equal(told(weighed(sampler.unet, torch.ones(2, 3)), context), told(sampler.unet, context))


def test_a_mix_takes_k_from_each_database_and_weighs_them_by_its_share(sampler):
    found = conditioned(sampler, mix=(("deep_red", 3.0), ("green", 1.0)))
    assert [one.database for one in found.neighbors] == ["deep_red"] * 4 + ["green"] * 4
    np.testing.assert_allclose(found.weights, [1] + [0.75] * 4 + [0.25] * 4)
    alone = conditioned(sampler, database="green")
    assert [one.image_id for one in found.neighbors[4:]] == [one.image_id for one in alone.neighbors]
    (one,) = sampler.sample([request(database="green")])
    (same,) = sampler.sample([request(mix=(("green", 5.0),))])
    assert np.array_equal(pixels(one), pixels(same))


def test_the_picture_moves_from_one_database_to_the_other_with_the_weights(sampler):
    ways = [(("deep_red", 1.0), ("green", weight)) for weight in (1e-5, 1.0, 1e5)]
    near_red, between, near_green = map(pixels, sampler.sample([request(mix=mix) for mix in ways]))
    red, green = map(pixels, sampler.sample([request(database=name) for name in ("deep_red", "green")]))
    assert np.abs(near_red - red).max() <= 1
    assert np.abs(near_green - green).max() <= 1
    assert min(np.abs(between - red).max(), np.abs(between - green).max()) > 1


def test_excluded_images_are_replaced_by_the_next_and_weighed_ones_count_less_or_not_at_all(sampler):
    first, second, third, *_ = (one.image_id for one in conditioned(sampler, k=6).neighbors)
    found = conditioned(sampler, exclude=(first, third, 1), weights=((second, 0.0),))
    six = [one.image_id for one in conditioned(sampler, k=6).neighbors]
    assert [one.image_id for one in found.neighbors] == [six[3], six[4], six[5]]
    half = conditioned(sampler, weights=((second, 0.5),))
    np.testing.assert_array_equal(half.weights, [1, 1, 0.5, 1, 1])
    assert half.neighbors[1].weight == 0.5
    with pytest.raises(UserError, match="weigh one above 0"):
        conditioned(sampler, mode="neighbors", k=1, weights=((first, 0.0),))


def test_images_are_tokens_beside_the_prompt_and_turn_the_query_to_their_mean(sampler):
    one, two = image(sampler), image(sampler, "deep_red", 3)
    found = conditioned(sampler, prompt="", images=(one, two), database="index")
    np.testing.assert_allclose(found.context[:2], [one.embedding, two.embedding], atol=1e-6)
    database = sampler.database("index")
    scores = database.embeddings().astype(np.float32) @ (one.embedding + two.embedding)
    best = np.asarray(database.metadata()["image_id"])[np.argsort(-scores)[:4]]
    assert [one.image_id for one in found.neighbors] == best.tolist()
    assert len(conditioned(sampler, images=(one,), mode="text").context) == 2
    assert len(conditioned(sampler, images=(one,), mode="neighbors").context) == 4


def test_pseudo_queries_come_as_often_as_training_retrieves_them(sampler, retrieved):
    draws = PseudoQueries(sampler.root)
    drawn = [draws.draw(seed)[0] for seed in range(600)]
    rates = [drawn.count(one) / 600 for one in retrieved]
    np.testing.assert_allclose(rates, np.array([*SHARES.values()]) / 12, atol=0.06)
    assert {draws.draw(seed, top_m=0.5)[0] for seed in range(60)} == set(retrieved[:2])
    assert {draws.draw(seed, top_m=0.01)[0] for seed in range(9)} == {retrieved[0]}
    index = sampler.database("index")
    stored = index.embeddings()[np.asarray(index.metadata()["image_id"]) == draws.draw(5)[0]][0]
    np.testing.assert_allclose(draws.draw(5)[1], stored, atol=1e-3)


def test_a_retrieved_image_that_was_blocked_since_is_never_drawn(sampler, retrieved):
    index = sampler.root.child("index")
    block(index, [retrieved[0]])
    try:
        draws = PseudoQueries(sampler.root)
        assert retrieved[0] not in {draws.draw(seed)[0] for seed in range(50)}
    finally:
        index.delete(BLOCKED)


def test_unconditional_pictures_have_the_neighbors_of_a_pseudo_query_alone(sampler, retrieved):
    found = conditioned(sampler, prompt="", mode="unconditional", database="index", seed=3)
    assert found.pseudo_query in retrieved
    assert found.neighbors[0].image_id == found.pseudo_query, "its own nearest neighbor"
    assert len(found.context) == 4
    (sample,) = sampler.sample([request(prompt="", mode="unconditional", seed=3)])
    assert sample.recipe()["pseudo_query"] == found.pseudo_query
    assert {one.database for one in sample.neighbors} == {"green"}


def test_a_recipe_of_everything_at_once_makes_its_picture_again(sampler):
    six = [one.image_id for one in conditioned(sampler, k=6).neighbors]
    whole = request(
        images=(image(sampler),),
        mix=(("green", 2.0), ("sky_blue", 1.0)),
        exclude=(six[0],),
        weights=((six[1], 2.0),),
        seed=9,
    )
    (sample,) = sampler.sample([whole])
    recipe = json.loads(json.dumps(sample.recipe()))
    assert Request.of(recipe) == whole
    assert np.array_equal(pixels(sampler.sample([Request.of(recipe)])[0]), pixels(sample))
    beside = sample.provenance()["neighbors"][0]
    assert (beside["database"], beside["weight"], beside["details"]["width"]) == ("green", 4 / 3, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": ""}, "nothing to condition on"),
        ({"mix": (("green", 0.0),)}, "weight above 0"),
        ({"mix": (("green", 1.0), ("green", 2.0))}, "each database once"),
        ({"mix": (("green", float("nan")),)}, "weight above 0"),
        ({"mix": (("nowhere", 1.0),)}, "no database 'nowhere'"),
        ({"weights": ((5, -1.0),)}, "weights of neighbors"),
        ({"top_m": 0.0}, "top_m must be above 0"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_what_means_nothing_is_refused(sampler, settings, words):
    with pytest.raises(UserError, match=words):
        sampler.plan([request(**settings)])


def test_an_image_that_is_none_or_of_another_encoder_is_refused(sampler):
    with pytest.raises(UserError, match=r"a\.png is not a readable picture"):
        sampler.image_query("a.png", b"nothing")
    short = dataclasses.replace(image(sampler), vector="AAAAAA==")
    with pytest.raises(UserError, match="embedded by another encoder"):
        sampler.plan([request(images=(short,))])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3e38])
def test_an_image_whose_vector_has_no_direction_is_refused(sampler, value):
    with pytest.raises(UserError, match=r"a\.png' is zero or not finite"):
        sampler.plan([request(images=(ImageQuery.of("a.png", b"", np.full(DIM, value)),))])


def test_a_prompt_and_an_image_count_the_same_unless_they_cancel_out(sampler):
    text = sampler.encoder.encode_texts(["a circle"])[0]
    with pytest.raises(UserError, match="cancel out"):
        sampler.plan([request(images=(ImageQuery.of("a.png", b"", -text),))])
    one = image(sampler)
    long = ImageQuery.of("long", b"", 9 * one.embedding)
    near, same = (conditioned(sampler, images=(each,)).neighbors for each in (one, long))
    assert [each.image_id for each in near] == [each.image_id for each in same]
    np.testing.assert_allclose([n.similarity for n in near], [n.similarity for n in same], atol=1e-5)


def test_a_prompt_alone_is_searched_with_the_calibration_of_texts(sampler, monkeypatch):
    search, efforts = Database.search, []

    def watched(database, *args, **options):
        efforts.append(options["effort"])
        return search(database, *args, **options)

    monkeypatch.setattr(Database, "search", watched)
    both = [request(), request(images=(image(sampler),)), request(prompt="", images=(image(sampler),))]
    sampler.plan(both)
    green = sampler.database("green")
    assert green.effort(0.95, "texts") != green.effort(0.95, "images")
    assert efforts == [green.effort(0.95, "images"), green.effort(0.95, "texts")]


def test_a_recipe_that_is_none_is_refused():
    with pytest.raises(UserError, match="no recipe of a sample"):
        Request.of({"seed": 1})
