"""The demo world: drawn pictures, LAION-shaped metadata about them, style folders and held-out prompts.

Writes below a folder: images/ and metadata/ (what the pipeline meets, through URLs only), styles/,
held_out/ with held_out.parquet, truth.parquet, and world.json last. Nothing may be downloaded for the
demo, so it brings its own web; jobs.demo.server.server serves it.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.demo.recipe import WorldConfig
from jobs.demo.world.bad_rows import spoiled_rows
from jobs.demo.world.content import Scene
from jobs.demo.world.copies import related_rows
from jobs.demo.world.metadata import CONTENT_FIELDS, Row, Site, ordinary_row, scene_fields, write_tables
from jobs.demo.world.pictures import Copy, Drawing, start_worker, write_picture
from jobs.demo.world.scenes import STYLES, all_contents, full_caption, is_held_out, prompt, random_scene
from retrieval.errors import UserError
from retrieval.storage.root import Root

# raise it when the same config draws or writes something else than before
WORLD_VERSION = 1
FINISHED = "world.json"
BEGUN = "world.begun.json"
OWNED = ("images", "metadata", "styles", "held_out", "held_out.parquet", "truth.parquet")
SMALL_PX = 256
SHUFFLE_STREAM = 4
STYLES_STREAM = 5
HELD_OUT_STREAM = 6

HELD_OUT_SCHEMA = pa.schema(
    [("path", pa.string()), ("caption", pa.string()), ("prompt", pa.string())]
    + [(name, pa.int64() if name == "count" else pa.string()) for name in (*CONTENT_FIELDS, "style")]
)


def write_world(config: WorldConfig, folder: Path) -> None:
    """Draws the world into folder, or completes one that was interrupted.

    A finished world of an equal config is left as it is, one of another config is removed first. Raises
    UserError if the folder holds anything else, so that nothing foreign is ever deleted.
    """
    identity = {"version": WORLD_VERSION, "config": config.output_fields()}
    if _read_json(folder / FINISHED) == identity:
        return
    rows = plan_rows(config)
    held_out = plan_held_out(config)
    pictures = [row.file for row in rows if row.file is not None]
    drawings = [picture for picture in pictures if isinstance(picture, Drawing)]
    copies = [picture for picture in pictures if isinstance(picture, Copy)]
    drawings += plan_styles(config) + held_out
    root = Root(folder)
    _begin(root, folder, identity)
    _write_pictures(folder, [drawings, copies], config.workers)
    write_tables(rows, config.num_metadata_files, root)
    with root.writing("held_out.parquet") as pending:
        pq.write_table(held_out_table(held_out), pending.path)
    os.replace(folder / BEGUN, folder / FINISHED)


def plan_rows(config: WorldConfig) -> list[Row]:
    """Every metadata row with the picture behind it, shuffled."""
    site = Site(f"http://127.0.0.1:{config.port}", config.seed)
    num_ordinary = config.num_train + config.num_database
    train = [ordinary_row(site, uid, large=True) for uid in range(config.num_train)]
    database = [ordinary_row(site, uid, large=False) for uid in range(config.num_train, num_ordinary)]
    unusual = spoiled_rows(site, num_ordinary, num_ordinary) + related_rows(site, train, database)
    rows = train + database + unusual
    order = np.random.default_rng([config.seed, SHUFFLE_STREAM]).permutation(len(rows))
    return [rows[i] for i in order]


def plan_styles(config: WorldConfig) -> list[Drawing]:
    """The style folders' pictures, `styles/<style>/NNNNN.jpg`; no held-out content is among them."""
    drawings = []
    for number, style in enumerate(STYLES):
        rng = np.random.default_rng([config.seed, STYLES_STREAM, number])
        for i in range(config.num_per_style):
            path = f"styles/{style}/{i:05d}.jpg"
            drawings.append(Drawing(path, random_scene(rng, style=style), SMALL_PX, SMALL_PX))
    return drawings


def plan_held_out(config: WorldConfig) -> list[Drawing]:
    """The held-out pictures, `held_out/NNNNN.jpg`: no two share content and style."""
    pairs = [(content, style) for content in all_contents() if is_held_out(content) for style in STYLES]
    if config.num_held_out > len(pairs):
        raise UserError(
            f"world.num_held_out is {config.num_held_out}, but only {len(pairs)} pairs of a held-out content "
            f"and a style exist. Set it to {len(pairs)} or less."
        )
    rng = np.random.default_rng([config.seed, HELD_OUT_STREAM])
    drawings = []
    for i, chosen in enumerate(rng.choice(len(pairs), config.num_held_out, replace=False)):
        content, style = pairs[chosen]
        scene = Scene(content, style, int(rng.integers(2**31)))
        drawings.append(Drawing(f"held_out/{i:05d}.jpg", scene, SMALL_PX, SMALL_PX))
    return drawings


def held_out_table(drawings: list[Drawing]) -> pa.Table:
    """One row per held-out picture: path, full caption, prompt without style, content and style."""
    records = [
        {"path": drawing.path, "caption": full_caption(scene), "prompt": prompt(scene.content)}
        | scene_fields(scene)
        for drawing in drawings
        for scene in [drawing.scene]
    ]
    return pa.Table.from_pylist(records, HELD_OUT_SCHEMA)


def _read_json(path: Path) -> object:
    return json.loads(path.read_text()) if path.is_file() else None


def _begin(root: Root, folder: Path, identity: dict[str, object]) -> None:
    """Clears what another config left, and notes which config the pictures from now on belong to."""
    if _read_json(folder / BEGUN) != identity:
        _clear(folder)
        root.write_json(BEGUN, identity)
    root.delete_partial_files("")
    for name in ("images", "held_out", *(f"styles/{style}" for style in STYLES)):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _clear(folder: Path) -> None:
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    records = [name for name in (FINISHED, BEGUN) if name in present]
    foreign = [name for name in present if not (records and name in (*OWNED, *records))]
    if foreign := [name for name in foreign if not name.startswith(".partial-")]:
        raise UserError(
            f"{folder} holds {foreign[0]!r}, which is no part of a demo world, and the world there must be "
            f"drawn anew. Move it away or choose another folder."
        )
    if FINISHED in records:
        # it vouches for nothing from here on, yet the folder must stay known as ours if we are killed
        os.replace(folder / FINISHED, folder / BEGUN)
    for name in (name for name in OWNED if name in present):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_pictures(folder: Path, phases: list[list[Drawing] | list[Copy]], workers: int) -> None:
    """Writes the pictures that are not there yet, one phase after the other.

    Every picture appears complete, so one that is there is done.
    """
    write: Callable[[Drawing | Copy], None] = partial(write_picture, folder)
    missing = [[picture for picture in phase if not (folder / picture.path).exists()] for phase in phases]
    total, left = sum(map(len, phases)), sum(map(len, missing))
    # spawned: the command may hold threads (Ray, torch) that a fork would copy in any state
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(),))
    with pool, tqdm(total=total, initial=total - left, desc="world", unit=" pictures") as bar:
        for pictures in missing:
            for _ in pool.map(write, pictures, chunksize=16):
                bar.update()
