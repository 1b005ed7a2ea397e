"""patches: every picture gives some, all together no more than allowed, each where its box says."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline import embed, index
from pipeline.embed import EmbedConfig
from pipeline.patches import PatchesConfig, patch_boxes, patch_counts, quotas
from retrieval import Database, Root, UserError
from retrieval.build import IndexConfig
from retrieval.encoder import ClipConfig, Encoder
from retrieval.manifest import Manifest, ShardRecord
from retrieval.sheet import Answer, write_sheet

from .conftest import pictures, write_download

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


@pytest.mark.usefixtures("ray_cluster")
def test_patches_go_from_download_to_search_and_are_drawn_from_their_boxes(
    tmp_path: Path, clip: ClipConfig
) -> None:
    root, stored = Root(tmp_path), pictures("database", 1, 6)
    broken = replace(pictures("database", 9, 1)[0], data=b"no picture")
    write_download(root, {"train/00000": pictures("train", 30, 3), "database/00000": [*stored, broken]})
    config = EmbedConfig(patches=PATCHES, workers=1)
    embedded = embed.run(config, clip, root)
    assert 2 <= embedded.reasons["unreadable"] <= 3
    index.run(IndexConfig(workers=1), root)
    database = Database.open(root.child("index"))
    rows = database.metadata().to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert {row["url"] for row in rows} == {picture.url for picture in stored}
    assert {(row["box"][2], row["width"], row["height"]) for row in rows} == {(16, 16, 16)}
    images = {picture.url: Image.open(io.BytesIO(picture.jpeg)) for picture in stored}
    cuts = [
        images[row["url"]].resize((32, 32), Image.Resampling.BICUBIC, (x, y, x + 16, y + 16))
        for row in rows
        for x, y, _, _ in [row["box"]]
    ]
    wanted = Encoder(clip).encode_images(cuts)
    np.testing.assert_allclose(database.embeddings().astype(np.float32), wanted, atol=3e-3)
    found = database.search(wanted[:1], 2)
    assert found.rows[0]["box"][0].as_py() == rows[0]["box"]
    assert config.output_fields() != EmbedConfig(workers=1).output_fields()


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
