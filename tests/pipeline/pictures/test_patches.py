"""patches: every picture gives some, all together no more than allowed, each where its box says."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.pictures.patches import patch_boxes, patch_counts, patch_id, patch_pictures, quotas
from pipeline.recipe import EmbedConfig, PatchesConfig
from retrieval import UserError
from retrieval.cli.contact_sheet import Answer, write_sheet
from retrieval.storage.manifest import Manifest, ShardRecord
from tests.pipeline.conftest import pictures

PATCHES = PatchesConfig(max_patches=1000, shorter_side=96, edge=32)


def download_of(*rows: int) -> Manifest:
    shards = tuple(ShardRecord(f"database/{i:05d}", count, ()) for i, count in enumerate(rows))
    return Manifest("download", 1, "d", {}, {}, (ShardRecord("train/00000", 50, ()), *shards), {}, 1.0)


def test_every_picture_gives_a_patch_and_all_together_no_more_than_allowed() -> None:
    for most in (60, 100, 149, 1000):
        config = PATCHES.model_copy(update={"max_patches": most})
        shares = quotas(download_of(40, 0, 20), config)
        assert sum(shares.values()) == most
        counts = [
            patch_counts(n, shares[f"database/{i:05d}"], config, np.random.default_rng(i))
            for i, n in ((0, 40), (2, 20))
        ]
        assert all(one.min() >= 1 and one.max() <= 3 for one in counts)
        total = sum(one.sum() for one in counts)
        assert total == min(most, total)
        assert most < 1000 or {*counts[0]} == {2, 3}, "two or three of each where there is room"
        assert most != 100 or counts[0][-20:].max() > 1, "what is over goes to no picture for its place"
    with pytest.raises(UserError, match="each of 60 pictures is to give a patch"):
        quotas(download_of(40, 20), PATCHES.model_copy(update={"max_patches": 59}))
    assert quotas(download_of(40), PatchesConfig()) == {}


def test_boxes_are_squares_inside_the_picture_of_the_size_that_scaling_leaves() -> None:
    corners = set()
    for image_id in range(-50, 50):
        for x, y, width, height in patch_boxes((300, 150), 3, PATCHES, image_id):
            assert (width, height) == (50, 50), "32 of 96 are 50 of 150"
            assert 0 <= x <= 250
            assert 0 <= y <= 100
            corners.add((x, y))
    assert len(corners) > 250
    assert max(x for x, _ in corners) > 240
    assert patch_boxes((20, 9), 1, PATCHES.model_copy(update={"edge": 96}), 1)[0][2:] == (9, 9)
    whole = patch_boxes((30, 30), 3, PATCHES.model_copy(update={"edge": 96}), 1)
    assert whole == [(0, 0, 30, 30)], "a box that is drawn again gives no second patch of the same id"


def test_every_patch_of_a_picture_that_cannot_be_read_comes_empty() -> None:
    boxes = {7: [(0, 0, 16, 16), (4, 4, 16, 16)], 8: [(1, 2, 16, 16)]}
    [picture] = pictures("database", 1, 1)
    found = dict(patch_pictures(iter([(7, b"no picture"), (8, picture.jpeg)]), boxes, 32, 1))
    assert [found[patch_id(7, box)] for box in boxes[7]] == [b"", b""]
    assert Image.open(io.BytesIO(found[patch_id(8, boxes[8][0])])).size == (32, 32)
    assert EmbedConfig(patches=PATCHES).output_fields() != EmbedConfig().output_fields()


def test_a_sheet_shows_the_part_in_the_box(tmp_path: Path) -> None:
    halves = Image.new("RGB", (40, 20), "blue")
    halves.paste("red", (20, 0, 40, 20))
    halves.save(tmp_path / "a.png")
    row = {"url": "a.png", "caption": "", "rank": 1, "similarity": 1.0}
    for box, color in (([0, 0, 20, 20], (0, 0, 255)), ([20, 0, 20, 20], (255, 0, 0))):
        write_sheet(tmp_path / "sheet.png", [Answer("q", [row | {"box": box}])], tmp_path)
        assert Image.open(tmp_path / "sheet.png").getpixel((30, 90)) == color


@pytest.mark.parametrize("wrong", [{"fewest": 4}, {"edge": 1201}, {"most": 0}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        PatchesConfig(**wrong)
