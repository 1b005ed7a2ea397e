"""Rows that cannot be read: tried again, replaced, counted."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.training_set import NAMES, SHAPE, VIEWS, ids_of, plan_of, png, write_latents, write_tar, write_tars
from trainer.data import unreadable
from trainer.data.loader import Loader
from trainer.data.unreadable import UnreadableError, read_or_replace


def member(image_id: int) -> str:
    """The name of an image in a tar."""
    return f"{image_id & (2**64 - 1):016x}.jpg"


def test_an_unreadable_picture_is_replaced_by_the_same_row_on_any_number_of_ranks(
    training_set: Root, autoencoder_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tars(training_set)
    plan = plan_of(autoencoder_folder, training_set, source="images", global_batch=12)
    intact = [Loader(plan, training_set, 0, 1).batch(step) for step in range(6)]
    bad = ids_of(2)[4].item()
    members = {member(image_id): png(Image.new("RGB", (96, 80))) for image_id in ids_of(2).tolist()}
    members[member(bad)] = b"no picture"
    write_tar(training_set, NAMES[2], members)
    single = Loader(plan, training_set, 0, 1)
    batches = [single.batch(step) for step in range(6)]
    [(step, index)] = [(step, i) for step, batch in enumerate(batches) for i in np.flatnonzero(batch.replaced)]
    assert intact[step].image_ids[index] == bad
    replacement = batches[step].image_ids[index]
    assert replacement in set(ids_of(2).tolist()) - {bad}
    row = ids_of(2).tolist().index(replacement)
    context = batches[step].context[index].numpy()
    np.testing.assert_array_equal(context, single.shard(1).context[row] * context.any())
    kept = ~batches[step].replaced
    np.testing.assert_array_equal(intact[step].image_ids[kept], batches[step].image_ids[kept])
    shares = [Loader(plan, training_set, rank, 2).batch(step) for rank in (0, 1)]
    assert [share.image_ids[share.replaced].tolist() for share in shares if share.replaced.any()] == [[replacement]]
    assert f"image {bad} is replaced" in caplog.text


def test_an_unreadable_held_out_picture_is_replaced_by_a_held_out_one(
    training_set: Root, autoencoder_folder: str
) -> None:
    write_tars(training_set)
    plan = plan_of(autoencoder_folder, training_set, source="images", validation_images=5)
    reader = Loader(plan, training_set, 0, 1)
    members = {member(image_id): b"" for image_id in ids_of(3)[:22].tolist()}
    members |= {member(image_id): png(Image.new("RGB", (96, 80))) for image_id in ids_of(3)[22:].tolist()}
    write_tar(training_set, NAMES[3], members)
    assert {reader.held_out(2, row)[0] for row in range(20, 25)} <= {22, 23, 24}


def test_images_without_latents_are_replaced_if_the_latents_stage_has_counted_them(
    training_set: Root, autoencoder_folder: str
) -> None:
    moments = np.ones((len(ids_of(2)) - 2, VIEWS, 2, *SHAPE), np.float16)
    write_latents(training_set, NAMES[2], ids_of(2)[:-2], moments)
    manifest = read_manifest(training_set, "latents/64")
    for counted in (1, 2):
        shards = [
            replace(shard, rows=16, reasons={"unreadable": counted}) if shard.shard == NAMES[2] else shard
            for shard in manifest.shards
        ]
        write_manifest(training_set, replace(manifest, shards=tuple(shards)))
        reader = Loader(plan_of(autoencoder_folder, training_set), training_set, 0, 1)
        if counted == 1:
            with pytest.raises(UserError, match="lacks 2 images of the neighbors table"):
                reader.shard(1)
            continue
        batches = [reader.batch(step) for step in range(9)]
        assert sum(int(batch.replaced.sum()) for batch in batches) == 2
        lost = set(ids_of(2)[-2:].tolist())
        assert not any(lost & set(batch.image_ids.tolist()) for batch in batches)


class Shard:
    """A shard of which the first `failures` reads fail, and rows of `bad` always."""

    ids = np.arange(30)

    def __init__(self, failures: int, bad: range) -> None:
        self.failures, self.bad = failures, bad

    def inputs(self, row: int, epoch: int) -> np.ndarray:
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        if row in self.bad:
            raise UnreadableError(f"row {row} is damaged")
        return np.array([row, epoch])


def test_a_read_error_is_tried_again_and_a_shard_of_unreadable_rows_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(unreadable, "PAUSES_S", (0.0, 0.0))
    row, inputs = read_or_replace(Shard(2, range(0)), 7, 3, np.arange(30), (1,))
    assert (row, inputs.tolist()) == (7, [7, 3])
    assert read_or_replace(Shard(3, range(0)), 7, 3, np.arange(30), (1,))[0] != 7
    assert read_or_replace(Shard(0, range(20)), 7, 3, np.arange(30), (1,))[0] >= 20
    with pytest.raises(UserError, match=r"image 7 and 8 others .* cannot be read\..*row 7 is damaged"):
        read_or_replace(Shard(0, range(30)), 7, 3, np.arange(30), (1,))
