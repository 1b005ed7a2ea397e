"""Models that were trained on CLIP vectors at the length that CLIP gives them (`model.context_norm = "raw"`)."""

import io

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import UserError
from retrieval.imports.importer import build_database
from retrieval.storage import schema
from retrieval.storage.root import Root
from tests.trainer.tiny_run import pictures_of, write_model, write_run
from trainer.sampling.batches import SamplingBatch
from trainer.sampling.conditioning import ConditionedRequest
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import ImageQuery, Request
from trainer.sampling.sampler import Sampler, TrainedModel

COMPUTE = ComputeConfig(device="cpu", workers=1, threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, TrainedModel]:
    return write_run(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def sampler(run: tuple[Root, TrainedModel]) -> Sampler:
    return Sampler.open(*run, COMPUTE)


@pytest.fixture(scope="module")
def raw_sampler(run: tuple[Root, TrainedModel], sampler: Sampler) -> Sampler:
    """The same network as a model of raw vectors."""
    root, trained = run
    write_model(root, sampler.encoder, sampler.autoencoder, "raw", "raw")
    return Sampler.open(root, trained.model_copy(update={"name": "raw"}), COMPUTE)


def request(**settings: object) -> Request:
    return Request(**({"prompt": "a circle", "database": "green", "k": 4, "guidance": 2.0, "steps": 2} | settings))


def conditioned(sampler: Sampler, *requests: Request) -> list[ConditionedRequest]:
    batches: list[SamplingBatch] = sampler.plan(requests)
    items = {position: item for batch in batches for position, item in zip(batch.positions, batch.items, strict=True)}
    return [items[position] for position in range(len(requests))]


def image_query(sampler: Sampler, picture: Image.Image) -> ImageQuery:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return sampler.image_query("picture.png", data.getvalue())


def test_tokens_have_the_lengths_that_clip_gives(sampler: Sampler, raw_sampler: Sampler) -> None:
    encoder, picture = raw_sampler.encoder, pictures_of("green")[3]
    image = image_query(raw_sampler, picture)
    requests = [request(mode="text"), request(), request(prompt="", k=2, images=(image,))]
    text, both, by_image = conditioned(raw_sampler, *requests)
    prompt = encoder.encode_texts(["a circle"], unit=False)
    np.testing.assert_allclose(text.context, prompt, rtol=1e-5)
    numbers = [int(neighbor.url.rpartition("-")[2].removesuffix(".jpg")) for neighbor in both.neighbors]
    neighbors = encoder.encode_images([pictures_of("green")[number] for number in numbers], unit=False)
    np.testing.assert_allclose(both.context, np.concatenate([prompt, neighbors]), rtol=5e-3, atol=2e-3)
    np.testing.assert_allclose(by_image.context[:1], encoder.encode_images([picture], unit=False), rtol=1e-5)


def test_a_model_of_unit_vectors_gets_the_same_directions_and_neighbors(sampler: Sampler, raw_sampler: Sampler) -> None:
    requests = [request(mode="text"), request(), request(images=(image_query(sampler, pictures_of("green")[3]),))]
    for unit, raw in zip(conditioned(sampler, *requests), conditioned(raw_sampler, *requests), strict=True):
        lengths = np.linalg.norm(raw.context, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.01
        np.testing.assert_allclose(unit.context, raw.context / lengths, atol=1e-5)
        assert unit.neighbors == raw.neighbors
        assert not any(schema.NORM in neighbor.details for neighbor in raw.neighbors)
    unit_picture, raw_picture = (s.sample(requests[1:2])[0].picture for s in (sampler, raw_sampler))
    assert np.abs(np.asarray(unit_picture, int) - np.asarray(raw_picture, int)).max() > 0


def test_vectors_of_unknown_length_are_an_error(sampler: Sampler, raw_sampler: Sampler) -> None:
    vectors = sampler.encoder.encode_images(pictures_of("green"))
    build_database(sampler.root.child("databases/bought"), vectors, encoder=sampler.encoder.identity)
    assert len(sampler.plan([request(database="bought")])) == 1
    with pytest.raises(UserError, match="database bought lacks the lengths of 4 of 4 vectors"):
        raw_sampler.plan([request(database="bought")])
    with pytest.raises(UserError, match="has length 1"):
        raw_sampler.plan([request(images=(ImageQuery.from_file("a.png", b"", vectors[0]),))])
