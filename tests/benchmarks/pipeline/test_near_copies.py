"""The near-copy benchmark at a tiny size: copies are found where they must be, and the page says so."""

from pathlib import Path

from benchmarks.pipeline.near_copies import page, scenes, world
from retrieval.clip.encoder import Encoder
from tests.pipeline.conftest import write_clip


def test_scaled_and_mirrored_copies_are_found_by_hash_and_other_pictures_stay(tmp_path: Path) -> None:
    encoder = Encoder(write_clip(tmp_path / "clip", seed=0))
    found = world("Drawn scenes", list(scenes(8)), encoder, (6, 0.999))
    assert (found["originals"], found["others"]) == (4, 4)
    assert found["recall"]["recompressed, quality 40"]["hash"] == 1
    assert found["recall"]["mirrored"]["hash"] == 1
    assert found["recall"]["cropped by 20 %"]["hash"] == 0
    assert found["false"]["hash"] == 0
    for ways in found["recall"].values():
        assert ways["either"] >= max(ways["hash"], ways["embedding"])
    timed = {"hash_ms": 0.3, "compare_s": 1.0}
    text = page({"hardware": "none", "bits": 6, "similarity": 0.999, "worlds": [found], **timed})
    assert "| mirrored | 100.0 % |" in text
