"""Number, boxes and pixels of patches."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.pictures.patches import patch_boxes, patch_counts, patch_id, patch_pictures, patch_quotas
from pipeline.recipe import EmbedConfig, PatchesConfig
from retrieval import UserError
from retrieval.cli.contact_sheet import QueryResult, write_contact_sheet
from retrieval.storage.manifest import Manifest, ShardRecord
from tests.pipeline.conftest import pictures

PATCHES = PatchesConfig(max_patches=1000, shorter_side=96, edge=32)


def download_of(*rows: int) -> Manifest:
    shards = tuple(ShardRecord(f"database/{i:05d}", count, ()) for i, count in enumerate(rows))
    return Manifest("download", 1, "d", {}, {}, (ShardRecord("train/00000", 50, ()), *shards), {}, 1.0)


def test_every_picture_gives_a_patch_and_all_together_no_more_than_allowed() -> None:
    for max_patches in (60, 100, 149, 1000):
        config = PATCHES.model_copy(update={"max_patches": max_patches})
        quotas = patch_quotas(download_of(40, 0, 20), config)
        assert sum(quotas.values()) == max_patches
        counts = [
            patch_counts(n, quotas[f"database/{i:05d}"], config, np.random.default_rng(i))
            for i, n in ((0, 40), (2, 20))
        ]
        assert all(shard.min() >= 1 and shard.max() <= 3 for shard in counts)
        assert sum(shard.sum() for shard in counts) <= max_patches
        assert max_patches < 1000 or {*counts[0]} == {2, 3}, "below the quota each gives two or three"
        assert max_patches != 100 or counts[0][-20:].max() > 1, "the extra patches are spread at random"
    with pytest.raises(UserError, match="each of the 60 pictures gives"):
        patch_quotas(download_of(40, 20), PATCHES.model_copy(update={"max_patches": 59}))
    assert patch_quotas(download_of(40), PatchesConfig()) == {}


def test_boxes_are_squares_inside_the_picture_with_the_scaled_edge() -> None:
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
    assert whole == [(0, 0, 30, 30)], "equal boxes give one patch, so that ids are unique"


def test_every_patch_of_an_unreadable_picture_is_empty() -> None:
    boxes = {7: [(0, 0, 16, 16), (4, 4, 16, 16)], 8: [(1, 2, 16, 16)]}
    [picture] = pictures("database", 1, 1)
    patches = dict(patch_pictures(iter([(7, b"no picture"), (8, picture.jpeg)]), boxes, 32, 1))
    assert [patches[patch_id(7, box)] for box in boxes[7]] == [b"", b""]
    assert Image.open(io.BytesIO(patches[patch_id(8, boxes[8][0])])).size == (32, 32)
    assert EmbedConfig(patches=PATCHES).output_fields() != EmbedConfig().output_fields()


def test_a_contact_sheet_shows_the_part_of_the_picture_in_the_box(tmp_path: Path) -> None:
    halves = Image.new("RGB", (40, 20), "blue")
    halves.paste("red", (20, 0, 40, 20))
    halves.save(tmp_path / "a.png")
    row = {"url": "a.png", "caption": "", "rank": 1, "similarity": 1.0}
    for box, color in (([0, 0, 20, 20], (0, 0, 255)), ([20, 0, 20, 20], (255, 0, 0))):
        write_contact_sheet(tmp_path / "sheet.png", [QueryResult("q", [row | {"box": box}])], tmp_path)
        assert Image.open(tmp_path / "sheet.png").getpixel((30, 90)) == color


@pytest.mark.parametrize("wrong", [{"min_per_picture": 4}, {"edge": 1201}, {"max_per_picture": 0}])
def test_contradictory_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        PatchesConfig(**wrong)
