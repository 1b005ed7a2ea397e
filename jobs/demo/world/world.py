"""The demo world, a synthetic data set: pictures, metadata in LAION's format, style folders, prompts.

Writes below a folder: images/ and metadata/ (the pipeline downloads the pictures by URL, from the demo's server),
styles/, held_out/ with held_out.parquet and all_styles.parquet, truth.parquet, and world.json last.
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
from jobs.demo.world.bad_rows import bad_rows
from jobs.demo.world.content import Scene
from jobs.demo.world.copies import related_rows
from jobs.demo.world.metadata import CONTENT_COLUMNS, Row, Site, ordinary_row, scene_fields, write_tables
from jobs.demo.world.pictures import Copy, Drawing, start_worker, write_picture
from jobs.demo.world.scenes import all_contents, full_caption, is_held_out, prompt, random_scene
from jobs.demo.world.styles import STYLES, UNKNOWN_STYLES
from retrieval.errors import UserError
from retrieval.storage.root import Root

# Increase it when the same config gives other files than before.
WORLD_VERSION = 3
FINISHED = "world.json"
STARTED = "world.begun.json"
OWNED = ("images", "metadata", "styles", "held_out", "held_out.parquet", "all_styles.parquet", "truth.parquet")
SMALL_PX = 256
SHUFFLE_STREAM = 4
STYLES_STREAM = 5
HELD_OUT_STREAM = 6
UNKNOWN_STREAM = 7

HELD_OUT_SCHEMA = pa.schema(
    [("path", pa.string()), ("caption", pa.string()), ("prompt", pa.string()), *CONTENT_COLUMNS, ("style", pa.string())]
)


def write_world(config: WorldConfig, folder: Path) -> None:
    """Draw the world into folder, or complete an interrupted one.

    A finished world of an equal config is kept, one of another config is removed first. Raises UserError if
    the folder contains other files, so that only files of the demo are ever deleted.
    """
    identity = {"version": WORLD_VERSION, "config": config.output_fields()}
    if _read_json(folder / FINISHED) == identity:
        return
    rows = plan_rows(config)
    held_out, unknown = plan_held_out(config), plan_unknown_held_out(config)
    pictures = [row.file for row in rows if row.file is not None]
    drawings = [picture for picture in pictures if isinstance(picture, Drawing)]
    copies = [picture for picture in pictures if isinstance(picture, Copy)]
    drawings += plan_styles(config) + held_out + unknown
    root = Root(folder)
    _begin(root, folder, identity)
    _write_pictures(folder, [drawings, copies], config.workers)
    write_tables(rows, config.num_metadata_files, root)
    for name, labelled in (("held_out", held_out), ("all_styles", held_out + unknown)):
        with root.writing(f"{name}.parquet") as pending:
            pq.write_table(held_out_table(labelled), pending.path)
    os.replace(folder / STARTED, folder / FINISHED)


def plan_rows(config: WorldConfig) -> list[Row]:
    """All metadata rows with their pictures, shuffled."""
    site = Site(f"http://127.0.0.1:{config.port}", config.seed, config.varied_share)
    num_ordinary = config.num_train + config.num_database
    train = [ordinary_row(site, uid, large=True) for uid in range(config.num_train)]
    database = [ordinary_row(site, uid, large=False) for uid in range(config.num_train, num_ordinary)]
    unusual = bad_rows(site, num_ordinary, num_ordinary) + related_rows(site, train, database)
    rows = train + database + unusual
    order = np.random.default_rng([config.seed, SHUFFLE_STREAM]).permutation(len(rows))
    return [rows[i] for i in order]


def plan_styles(config: WorldConfig) -> list[Drawing]:
    """The pictures of the style folders, `styles/<style>/NNNNN.jpg`, without held-out contents."""
    drawings = []
    for number, style in enumerate((*STYLES, *UNKNOWN_STYLES)):
        rng = np.random.default_rng([config.seed, STYLES_STREAM, number])
        for i in range(config.num_per_style):
            path = f"styles/{style}/{i:05d}.jpg"
            drawings.append(Drawing(path, random_scene(rng, style=style), SMALL_PX, SMALL_PX))
    return drawings


def plan_held_out(config: WorldConfig) -> list[Drawing]:
    """The held-out pictures, `held_out/NNNNN.jpg`. All pairs of content and style differ."""
    pairs = [(content, style) for content in all_contents() if is_held_out(content) for style in STYLES]
    if config.num_held_out > len(pairs):
        raise UserError(
            f"world.num_held_out is {config.num_held_out}, but only {len(pairs)} pairs of a held-out content "
            f"and a style exist. Set it to {len(pairs)} or less."
        )
    rng = np.random.default_rng([config.seed, HELD_OUT_STREAM])
    drawings = []
    for i, pair in enumerate(rng.choice(len(pairs), config.num_held_out, replace=False)):
        content, style = pairs[pair]
        scene = Scene(content, style, int(rng.integers(2**31)))
        drawings.append(Drawing(f"held_out/{i:05d}.jpg", scene, SMALL_PX, SMALL_PX))
    return drawings


def plan_unknown_held_out(config: WorldConfig) -> list[Drawing]:
    """Pictures of the unknown styles with held-out contents, `held_out/<style>-NNNNN.jpg`, as many as of other styles.

    They train and test a judge on pixels.
    """
    drawings = []
    for number, style in enumerate(UNKNOWN_STYLES):
        rng = np.random.default_rng([config.seed, UNKNOWN_STREAM, number])
        for i in range(-(-config.num_held_out // len(STYLES))):
            scene = random_scene(rng, held_out=True, style=style)
            drawings.append(Drawing(f"held_out/{style}-{i:05d}.jpg", scene, SMALL_PX, SMALL_PX))
    return drawings


def held_out_table(drawings: list[Drawing]) -> pa.Table:
    """One row for each held-out picture: path, full caption, prompt without style, content and style."""
    records = [
        {"path": drawing.path, "caption": full_caption(scene), "prompt": prompt(scene.content)} | scene_fields(scene)
        for drawing in drawings
        for scene in [drawing.scene]
    ]
    return pa.Table.from_pylist(records, HELD_OUT_SCHEMA)


def _read_json(path: Path) -> object:
    return json.loads(path.read_text()) if path.is_file() else None


def _begin(root: Root, folder: Path, identity: dict[str, object]) -> None:
    """Remove files of another config, and store the config of the files that follow."""
    if _read_json(folder / STARTED) != identity:
        _clear(folder)
        root.write_json(STARTED, identity)
    root.delete_partial_files("")
    for name in ("images", "held_out", *(f"styles/{style}" for style in (*STYLES, *UNKNOWN_STYLES))):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _clear(folder: Path) -> None:
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    records = [name for name in (FINISHED, STARTED) if name in present]
    foreign = [name for name in present if not (records and name in (*OWNED, *records))]
    if foreign := [name for name in foreign if not name.startswith(".partial-")]:
        raise UserError(
            f"{folder} must be cleared for the demo world, but contains {foreign[0]!r}, which is not "
            f"a part of one. Move it away or choose another folder."
        )
    if FINISHED in records:
        # from here on the world is unfinished, but a rerun must still recognize the folder as a demo world
        os.replace(folder / FINISHED, folder / STARTED)
    for name in (name for name in OWNED if name in present):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_pictures(folder: Path, phases: list[list[Drawing] | list[Copy]], workers: int) -> None:
    """Write the missing pictures, one phase after the other. Files are written atomically."""
    write: Callable[[Drawing | Copy], None] = partial(write_picture, folder)
    missing = [[picture for picture in phase if not (folder / picture.path).exists()] for phase in phases]
    total, left = sum(map(len, phases)), sum(map(len, missing))
    # spawned: a fork would copy the threads of Ray or torch in an undefined state
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (os.getpid(),))
    with pool, tqdm(total=total, initial=total - left, desc="world", unit=" pictures") as bar:
        for pictures in missing:
            for _ in pool.map(write, pictures, chunksize=16):
                bar.update()
