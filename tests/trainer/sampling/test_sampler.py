"""`Sampler`: takes requests, returns pictures with their neighbors."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.tiny_run import PROMPTS, ROWS, STYLES, tiny_autoencoder, write_clip, write_run, write_style_database
from trainer.sampling.batches import even_chunks
from trainer.sampling.denoising import initial_noise
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request, prompts_digest, read_prompts
from trainer.sampling.sampler import Sampler, TrainedModel, database_names, pick_device

COMPUTE = ComputeConfig(device="cpu", batch_size=3, workers=2, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, TrainedModel]:
    return write_run(tmp_path_factory.mktemp("sampler"))


@pytest.fixture(scope="module")
def sampler(tiny) -> Sampler:
    return Sampler.open(*tiny, COMPUTE)


def request(**settings) -> Request:
    return Request(**({"prompt": PROMPTS[0], "database": "green", "k": 4, "guidance": 2.0, "steps": 2} | settings))


def pixels(sample) -> np.ndarray:
    return np.asarray(sample.picture).astype(int)


def test_samples_have_the_order_of_their_requests(sampler):
    requests = [
        request(prompt=prompt, seed=seed, mode=mode, database=database)
        for seed, (prompt, mode, database) in enumerate(
            (prompt, mode, database)
            for prompt in PROMPTS
            for mode in ("text_and_neighbors", "text", "neighbors")
            for database in ("green", "index")
        )
    ]
    batch_sizes = []
    samples = sampler.sample(requests, batch_sizes.append)
    assert [sample.request for sample in samples] == requests
    assert sum(batch_sizes) == len(requests)
    assert max(batch_sizes) <= 3


def test_a_sample_does_not_depend_on_its_batch(sampler):
    requests = [request(seed=seed, guidance=1.0 + seed) for seed in range(5)]
    together = sampler.sample(requests)
    for single, sample in zip(requests, together, strict=True):
        (alone,) = sampler.sample([single])
        # One gray level: floating-point sums may round differently in batches of another size.
        assert np.abs(pixels(alone) - pixels(sample)).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[1])).max() > 30


def test_a_negative_prompt_takes_the_place_of_the_empty_context(sampler):
    text = partial(request, mode="text")
    plain, equal, other, interval = sampler.sample(
        [
            text(guidance=1.0),
            # Away from the prompt itself: the difference is zero, and guidance has no effect.
            text(guidance=5.0, negative_prompt=PROMPTS[0]),
            text(guidance=5.0, negative_prompt=PROMPTS[1]),
            text(guidance=5.0, negative_prompt=PROMPTS[1], guidance_interval=(0.9, 1.0)),
        ]
    )
    assert np.abs(pixels(equal) - pixels(plain)).max() <= 1
    assert np.abs(pixels(other) - pixels(plain)).max() > 1
    assert np.abs(pixels(interval) - pixels(other)).max() > 1
    assert not {"negative_prompt", "guidance_interval"} & plain.recipe().keys()
    assert Request.from_recipe(json.loads(json.dumps(interval.recipe()))) == interval.request


def test_a_negative_prompt_needs_guidance_and_an_interval_increases():
    with pytest.raises(UserError, match="no effect without guidance"):
        request(negative_prompt="grey", guidance=1.0).check()
    with pytest.raises(UserError, match=r"two increasing numbers from 0 to 1, got 0\.5 and 0\.2"):
        request(guidance_interval=(0.5, 0.2)).check()


def test_another_database_changes_the_picture_and_the_neighbors(sampler):
    red, green = sampler.sample([request(database="deep_red"), request(database="green")])
    assert np.abs(pixels(red) - pixels(green)).max() > 1
    assert all("deep_red" in neighbor.url for neighbor in red.neighbors)
    assert all("green" in neighbor.url for neighbor in green.neighbors)


def test_neighbors_are_the_databases_best_rows_for_each_prompt(sampler):
    database = sampler.database("green")
    ids = np.asarray(database.metadata()["image_id"])
    texts = sampler.encoder.encode_texts(PROMPTS)
    samples = sampler.sample([request(prompt=prompt, k=5) for prompt in PROMPTS])
    for sample, text in zip(samples, texts, strict=True):
        scores = database.embeddings().astype(np.float32) @ text
        assert [neighbor.image_id for neighbor in sample.neighbors] == ids[np.argsort(-scores)[:5]].tolist()
        similarities = [neighbor.similarity for neighbor in sample.neighbors]
        np.testing.assert_allclose(similarities, np.sort(scores)[::-1][:5], atol=1e-3)


def test_each_mode_has_its_tokens(sampler):
    modes = ("text", "neighbors", "text_and_neighbors")
    batches = sampler.plan([request(mode=mode) for mode in modes])
    assert [batch.contexts.shape[1] for batch in batches] == [1, 4, 5]
    text, neighbors, both = (batch.contexts[0] for batch in batches)
    np.testing.assert_array_equal(both, np.concatenate([text, neighbors]))
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)


def test_a_database_with_fewer_rows_than_k_gives_a_shorter_context(sampler):
    (batch,) = sampler.plan([request(k=1000)])
    assert batch.contexts.shape[1] == ROWS + 1
    assert len(batch.items[0].neighbors) == ROWS


def test_requests_that_differ_in_scheduler_steps_or_tokens_are_not_batched_together(sampler):
    requests = [request(), request(steps=3), request(scheduler="plms"), request(k=2), request(seed=9)]
    assert sorted(batch.positions for batch in sampler.plan(requests)) == [(0, 4), (1,), (2,), (3,)]


def test_a_recipe_reproduces_its_picture(sampler):
    (sample,) = sampler.sample([request(scheduler="dpm++", seed=77)])
    recipe = json.loads(json.dumps(sample.recipe()))
    (reproduced,) = sampler.sample([Request.from_recipe(recipe)])
    assert np.array_equal(pixels(reproduced), pixels(sample))
    assert recipe["neighbors"] == [[neighbor.image_id, neighbor.similarity] for neighbor in reproduced.neighbors]
    assert len(recipe["model"]) == 64


def test_bfloat16_is_close_to_float32(tiny, sampler):
    (full,) = sampler.sample([request()])
    (half,) = Sampler.open(*tiny, ComputeConfig(device="cpu", precision="bf16")).sample([request()])
    assert 0 < np.abs(pixels(full) - pixels(half)).max() < 16


def test_pictures_have_the_requested_size_in_any_batch(sampler):
    sizes = [(0, 0), (16, 48), (48, 16), (16, 48), (0, 48)]
    requests = [request(seed=seed, height=height, width=width) for seed, (height, width) in enumerate(sizes)]
    samples = sampler.sample(requests)
    assert [sample.picture.size[::-1] for sample in samples] == [(h or 32, w or 32) for h, w in sizes]
    assert sorted(batch.positions for batch in sampler.plan(requests)) == [(0,), (1, 3), (2,), (4,)]
    (alone,) = sampler.sample(requests[3:4])
    assert np.abs(pixels(alone) - pixels(samples[3])).max() <= 1
    (training_size,) = sampler.sample([request(seed=0, height=32, width=32)])
    assert np.array_equal(pixels(training_size), pixels(samples[0]))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 20}, r"height must be a multiple of 8 pixels .*factor 4 .*2\), got 20\. Use 16 or 24"),
        ({"width": 4}, r"width must be .* got 4\. Use 8, or 0"),
        ({"width": -8}, "width must be"),
    ],
)
def test_a_size_that_is_not_a_multiple_is_refused(sampler, size, message):
    with pytest.raises(UserError, match=message):
        sampler.plan([request(**size)])


def test_a_diverging_model_is_an_error_that_names_the_request(sampler):
    with pytest.raises(UserError, match=r"'a circle' with seed 3 and guidance 1e\+38"):
        sampler.sample([request(seed=2), request(seed=3, guidance=1e38)])


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(sampler, steps):
    with pytest.raises(UserError, match="must be 1 to 1000"):
        sampler.plan([request(steps=steps)])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_beyond_32_bits_are_refused_since_their_noise_repeats(sampler, seed):
    sampler.plan([request(seed=2**32 - 1)])
    assert torch.equal(initial_noise([seed % 2**32], (1, 2, 2)), initial_noise([seed], (1, 2, 2)))
    with pytest.raises(UserError, match=f"a seed must be 0 to 4294967295, got {seed}"):
        sampler.plan([request(seed=seed)])


@pytest.mark.parametrize("name", ["nowhere", "", "../index", "green/partitions"])
def test_an_unknown_database_is_refused_with_the_known_names(sampler, name):
    with pytest.raises(UserError, match="deep_red, green, sky_blue"):
        sampler.sample([request(database=name)])


def test_a_database_of_another_encoder_is_refused(tiny, sampler, tmp_path):
    other = Encoder(write_clip(tmp_path / "clip", seed=5))
    write_style_database(tiny[0], "databases/foreign", other, ["green"])
    try:
        with pytest.raises(UserError, match="was built with"):
            sampler.sample([request(database="foreign")])
    finally:
        tiny[0].delete("databases/foreign")


def test_a_model_trained_with_another_encoder_is_refused(tiny, tmp_path):
    root, trained = tiny
    other = trained.model_copy(update={"clip": write_clip(tmp_path / "clip", seed=5)})
    with pytest.raises(UserError, match="trained on embeddings of encoder"):
        Sampler.open(root, other, COMPUTE)


def test_a_model_trained_with_another_autoencoder_is_refused(tiny, tmp_path):
    root, trained = tiny
    other = trained.model_copy(update={"autoencoder": tiny_autoencoder(tmp_path, seed=8)})
    with pytest.raises(UserError, match="trained on latents of autoencoder"):
        Sampler.open(root, other, COMPUTE)


def test_a_run_that_was_not_trained_is_refused(tiny):
    root, trained = tiny
    with pytest.raises(UserError, match="runs/other/train"):
        Sampler.open(root, trained.model_copy(update={"name": "other"}), COMPUTE)


def test_database_names_are_sorted_and_leave_out_the_training_database(tiny):
    assert database_names(tiny[0]) == sorted(STYLES)


def test_a_missing_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize(("count", "size", "lengths"), [(20, 8, [7, 6, 7]), (3, 8, [3]), (0, 8, []), (8, 8, [8])])
def test_chunks_are_few_and_of_nearly_equal_length(count, size, lengths):
    chunks = even_chunks(list(range(count)), size)
    assert [len(chunk) for chunk in chunks] == lengths
    assert [item for chunk in chunks for item in chunk] == list(range(count))


def test_prompts_are_read_without_comments_empty_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# of animals\n\n  a stag 🦌 \r\nein Hirsch\n".encode())
    assert read_prompts(str(path)) == ("a stag 🦌", "ein Hirsch")
    assert prompts_digest(["a", "b"]) != prompts_digest(["a\nb"])


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "no prompt"), (b"\xff\xfe\x00a", "not UTF-8"), (None, "does not exist")]
)
def test_an_invalid_prompts_file_is_refused(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompts(str(path))
