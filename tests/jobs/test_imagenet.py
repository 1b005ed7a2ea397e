"""The ImageNet recipe at tiny size: all stages from metadata to samples, with patches as neighbors."""

import io
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers import VQModel
from PIL import Image

from jobs import database, download, embed, filter, index, latents, neighbors, sample
from jobs.cli.recipe import Recipe, load_recipe
from jobs.train import training_recipe
from pipeline.databases.sources import PictureSource
from retrieval import Database, UserError
from retrieval.cli.commands import main
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.schema import image_id, sample_key
from tests.pipeline.shards_in_process import shards_in_process
from tests.trainer.tiny_run import DIM, write_clip
from tests.trainer.training.launched import train

CONFIGS = Path(__file__).resolve().parents[2] / "jobs/configs"
TRAINED, CUT = 6, 8
"""Number of training pictures, and of pictures cut into the database's patches."""
TINY = {
    "clip.pretrained": '""',
    "filter.min_edge": 32,
    "download.train_min_edge": 32,
    "download.database_edge": 64,
    "download.allow_private": "loopback",
    "download.timeout_s": 60.0,
    "download.deadline_s": 240.0,
    "embed.gpus_per_worker": 0.0,
    "embed.patches": "{max_patches = 20, shorter_side = 64, edge = 16}",
    "index.cores_per_partition": 1,
    "neighbors.gpus_per_worker": 0.0,
    "neighbors.near_copy_similarity": 0.9995,
    "latents.size": 32,
    "latents.gpus_per_worker": 0.0,
    "model.context_dim": DIM,
    "model.channels": "[32, 32]",
    "model.attention": "[1, 2]",
    "model.layers": 1,
    "train.size": 32,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.interleaved_shards": 2,
    "train.steps": 2,
    "train.warmup_steps": 1,
    "train.validation_images": 2,
    "train.precision": "fp32",
    "train.workers": 1,
    "sample.prompts": '["a stag"]',
    "sample.databases": '["index", "loan"]',
    "sample.k": 4,
    "sample.steps": 2,
    "sample.precision": "fp32",
} | {f"{stage}.workers": 1 for stage in ("filter", "download", "embed", "index", "neighbors", "latents", "sample")}


def write_pictures(folder: Path, seed: int, count: int) -> list[str]:
    """Write pictures of colored blocks, 100 x 80. Returns their names."""
    folder.mkdir(exist_ok=True)
    names = [f"{seed}-{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        blocks = np.random.default_rng([seed, i]).integers(0, 255, (8, 10, 3), np.uint8)
        Image.fromarray(blocks).resize((100, 80), Image.Resampling.NEAREST).save(folder / name)
    return names


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a web server, and the folder it serves."""
    folder = tmp_path_factory.mktemp("web")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, server: tuple[str, Path]) -> Recipe:
    """The recipe after all stages, and a second database, built from a folder."""
    folder, (url, web) = tmp_path_factory.mktemp("imagenet"), server
    names = write_pictures(web, 1, TRAINED) + write_pictures(web, 2, CUT)
    columns = {"URL": [f"{url}/{name}" for name in names], "TEXT": names, "WIDTH": [100] * len(names)}
    columns |= {"HEIGHT": [80] * len(names), "pwatermark": [0.0] * TRAINED + [1.0] * CUT}
    (folder / "metadata").mkdir()
    pq.write_table(pa.table(columns), folder / "metadata/a.parquet")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    widths = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "num_vq_embeddings": 16}
    VQModel(**blocks, **widths).save_pretrained(folder / "vq")
    paths = {"root": folder / "root", "filter.metadata": folder / "metadata", "autoencoder.path": folder / "vq"}
    paths["clip.model"] = write_clip(folder / "clip").model
    loaded = load_recipe(CONFIGS / "imagenet_rdm.toml", [f"{key}={value}" for key, value in (paths | TINY).items()])
    with shards_in_process():
        for stage in (filter, download, embed, index, neighbors, latents):
            stage.run(loaded)
    write_pictures(folder / "loan", 3, 4)
    database.run(loaded, "loan", PictureSource(folder / "loan", license="CC0"))
    train(training_recipe(loaded), loaded.root)
    sample.run(loaded)
    return loaded


def test_every_picture_gives_patches_up_to_the_limit_of_the_recipe(recipe: Recipe) -> None:
    rows = Database.open(recipe.root.child("index")).metadata().to_pylist()
    assert 2 * CUT <= len(rows) <= 20
    assert len({row["url"] for row in rows}) == CUT
    assert {tuple(row["box"][2:]) for row in rows} == {(16, 16)}
    manifest = read_manifest(recipe.root, "neighbors")
    assert (manifest.rows, manifest.values["k"]) == (TRAINED, 4)


def test_the_vector_of_a_patch_is_the_embedding_of_its_box(recipe: Recipe) -> None:
    index = Database.open(recipe.root.child("index"))
    stored: dict[str, Image.Image] = {}
    for path in sorted(recipe.root.local_path("download/database").glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".jpg"):
                    stored[name] = Image.open(io.BytesIO(tar.extractfile(name).read()))  # type: ignore[union-attr]
    cuts = []
    for row in index.metadata().to_pylist():
        x, y, width, height = row["box"]
        picture = stored[f"{sample_key(image_id(row['url']))}.jpg"]
        cuts.append(picture.resize((16, 16), Image.Resampling.BICUBIC, (x, y, x + width, y + height)))
    expected = Encoder(recipe[ClipConfig]).encode_images(cuts)
    np.testing.assert_allclose(index.embeddings().astype(np.float32), expected, atol=3e-3)


def test_samples_and_searches_report_boxes_of_patches_and_licenses_of_pictures(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patches, loans = (
        recipe.root.read_json(f"runs/imagenet/sample/{name}/0000-00.json")["neighbors"] for name in ("index", "loan")
    )
    assert [len(patch["details"]["box"]) for patch in patches] == [4] * 4
    assert [loan["details"]["license"] for loan in loans] == ["CC0"] * 4
    loan_database = Database.open(recipe.root.child("databases/loan"))
    np.save(tmp_path / "query.npy", loan_database.embeddings()[:1].astype(np.float32))
    main(["search", loan_database.root.url, "--vector", f"{tmp_path}/query.npy"])
    assert [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["CC0"] * 4
    card = recipe.root.local_path("databases/loan/README.md").read_text()
    assert "| CC0 | 4 |" in card
    assert "captions, and small pictures to show" in card


def test_latents_of_cpus_are_not_continued_in_bf16_on_gpus(recipe: Recipe) -> None:
    assert read_manifest(recipe.root, "latents/32").rows == TRAINED
    on_gpus = load_recipe(recipe.path, [*recipe.overrides, "latents.gpus_per_worker=1.0"])
    with pytest.raises(UserError, match=r"latents/32 has .* finished.*made from another precision\. They are kept"):
        latents.run(on_gpus)


def test_the_full_recipe_trains_the_same_model_as_the_training_recipe() -> None:
    whole, model = (
        tomllib.loads((CONFIGS / f"{name}.toml").read_text()) for name in ("imagenet_rdm", "train_imagenet")
    )
    assert model.items() <= whole.items()
