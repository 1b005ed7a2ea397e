"""The near-copy benchmark at a tiny size."""

from pathlib import Path

from benchmarks.pipeline.near_copies import measure_pictures, page, scenes
from retrieval.clip.encoder import Encoder
from tests.pipeline.conftest import write_clip


def test_scaled_and_mirrored_copies_are_found_by_hash_and_other_pictures_stay(tmp_path: Path) -> None:
    encoder = Encoder(write_clip(tmp_path / "clip", seed=0))
    result = measure_pictures("Drawn scenes", list(scenes(8)), encoder, (6, 0.999))
    assert (result["originals"], result["others"]) == (4, 4)
    assert result["recall"]["recompressed, quality 40"]["hash"] == 1
    assert result["recall"]["mirrored"]["hash"] == 1
    assert result["recall"]["cropped by 20 %"]["hash"] == 0
    assert result["false"]["hash"] == 0
    for shares in result["recall"].values():
        assert shares["either"] >= max(shares["hash"], shares["embedding"])
    timed = {"hash_ms": 0.3, "compare_s": 1.0, "pair_ps": 0.2}
    text = page({"hardware": "none", "bits": 6, "similarity": 0.999, "data_sets": [result], **timed})
    assert "| mirrored | 100.0 % |" in text
