"""sample: prompts and databases to pictures.

Reads `runs/<name>/train`, `databases/*` and `index`. Writes `runs/<name>/sample/<database>/<prompt>-<n>.png`
with the recipe in its text metadata, a `.json` beside each with the neighbors that conditioned it, and
`grid.png`, prompts by databases. Swapping the database swaps the style; nothing is trained again.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, read_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.sampling.batches import Batch
from trainer.sampling.picture import Grid, cell_edge, grid_png, open_picture, png_bytes
from trainer.sampling.recipe import Compute, SampleConfig
from trainer.sampling.request import TRAINING_DATABASE, ImageQuery, Request, Sample, prompts_digest
from trainer.sampling.resumable import Pieces
from trainer.sampling.sampler import Sampler, Trained, upstream_of

log = logging.getLogger("sample")

GRID_ROWS = 24
COLUMN_WORDS = {TRAINING_DATABASE: "training database", "text": "text alone"}


@dataclass(frozen=True)
class Job:
    """A request and the name of its picture below the stage's folder, without its ending."""

    name: str
    request: Request


def run(config: SampleConfig, trained: Trained, root: Root) -> Manifest:
    """Sample everything that the configuration names; finished batches of an interrupted run are kept."""
    began = time.monotonic()
    prompts = config.all_prompts()
    images = {name: read_image(name) for name in config.images}
    upstream = _upstream(config, trained, root, images) | {"prompts": prompts_digest(prompts)}
    stage = f"runs/{trained.name}/sample"
    pieces = Pieces(root, stage, fingerprint("sample", schema.VERSION, config, upstream))
    if (finished := pieces.manifest()) is not None:
        log.info(f"sample: {root.at(stage)} is finished")
        return finished
    sampler = Sampler.open(root, trained, config)
    jobs = make_jobs(config, prompts, image_queries(sampler, images))
    sampler.check([job.request for job in jobs])
    pieces.begin()
    records = _draw_all(sampler, jobs, pieces)
    grid = root.write_bytes(f"{stage}/grid.png", _grid(config, prompts, root, stage))
    records.append(ShardRecord("grid", 1, (grid,)))
    seconds = time.monotonic() - began
    return pieces.finish(
        Manifest(
            stage=stage,
            schema_version=schema.VERSION,
            fingerprint=pieces.fingerprint,
            upstream=upstream,
            config=config.model_dump(mode="json"),
            shards=tuple(records),
            values={**sampler.parts, "prompts": list(prompts), "columns": list(config.columns())},
            seconds=seconds,
        )
    )


def draw_one(config: SampleConfig, trained: Trained, root: Root, prompt: str) -> Sample:
    """A single picture, with the first of the configuration's databases; nothing is written."""
    sampler = Sampler.open(root, trained, config)
    images = image_queries(sampler, {name: read_image(name) for name in config.images})
    request = replace(config.wanted(prompt, config.seed, config.columns()[0]), images=images)
    (sample,) = sampler.sample([request])
    return sample


def draw_again(compute: Compute, trained: Trained, root: Root, recipe: dict[str, Any]) -> Sample:
    """The picture of a recipe. Raises UserError where this is another model, or neighbors have changed."""
    sampler = Sampler.open(root, trained, compute.model_copy(update={"precision": recipe.get("precision")}))
    changed = [name for name, digest in sampler.parts.items() if recipe.get(name) != digest]
    if changed:
        raise UserError(
            f"the recipe was made with another {' and '.join(changed)} than run {trained.name!r} has"
        )
    (sample,) = sampler.sample([Request.of(recipe)])
    if [one for one, _ in recipe["neighbors"]] != [one.image_id for one in sample.neighbors]:
        raise UserError("the databases have changed: the recipe's neighbors are not found any more")
    return sample


def read_image(name: str) -> bytes:
    """A picture's file. Raises UserError where there is none."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"image {name!r} cannot be read: {error}") from error


def image_queries(sampler: Sampler, images: Mapping[str, bytes]) -> tuple[ImageQuery, ...]:
    """Pictures to condition on, by name."""
    return tuple(sampler.image_query(Path(name).name, data) for name, data in images.items())


def make_jobs(config: SampleConfig, prompts: Sequence[str], images: tuple[ImageQuery, ...] = ()) -> list[Job]:
    """Every picture of the stage: by prompt, then by number, then by database."""
    return [
        Job(
            picture_name(column, number, n),
            replace(config.wanted(prompt, config.seed + n, column), images=images),
        )
        for number, prompt in enumerate(prompts)
        for n in range(config.images_per_prompt)
        for column in config.columns()
    ]


def picture_name(column: str, prompt: int, n: int) -> str:
    """Name of a picture below the stage's folder, without its ending."""
    return f"{column}/{prompt:04d}-{n:02d}"


def _upstream(
    config: SampleConfig, trained: Trained, root: Root, images: Mapping[str, bytes]
) -> dict[str, str]:
    made_from = upstream_of(root, trained, config.searched())
    if config.mode == "unconditional":
        made_from["neighbors"] = read_manifest(root, "neighbors").identity
    return made_from | {f"image/{name}": sha256(data).hexdigest()[:16] for name, data in images.items()}


def _draw_all(sampler: Sampler, jobs: Sequence[Job], pieces: Pieces) -> list[ShardRecord]:
    batches = sampler.plan([job.request for job in jobs])
    # A batch of another size holds other pictures, so its record must not stand for this one.
    piece_names = [f"{sampler.compute.batch_size:04d}-{number:05d}" for number in range(len(batches))]
    records = {number: record for number, name in enumerate(piece_names) if (record := pieces.done(name))}
    missing = [number for number in range(len(batches)) if number not in records]
    began, count = time.monotonic(), sum(len(batches[number].items) for number in missing)

    def read() -> Iterator[Batch]:
        yield from (batches[number] for number in missing)

    with tqdm(
        total=len(jobs), initial=len(jobs) - count, desc="sample", unit="image", mininterval=0.5
    ) as bar:
        for number, samples in zip(missing, sampler.draw(read()), strict=True):
            names = [jobs[position].name for position in batches[number].positions]
            files = [file for pair in zip(names, samples, strict=True) for file in _write(*pair, pieces)]
            records[number] = pieces.write(piece_names[number], files, len(samples))
            bar.update(len(samples))
    seconds = time.monotonic() - began
    log.info(f"sample: {count} images  {seconds:.1f} s  {count / max(seconds, 1e-9):.2f} images/s")
    return [records[number] for number in sorted(records)]


def _write(name: str, sample: Sample, pieces: Pieces) -> list[FileRecord]:
    place = f"{pieces.stage}/{name}"
    return [
        pieces.root.write_bytes(f"{place}.png", png_bytes(sample.picture, sample.recipe())),
        pieces.root.write_json(f"{place}.json", sample.provenance()),
    ]


def _grid(config: SampleConfig, prompts: Sequence[str], root: Root, stage: str) -> bytes:
    """Prompts by databases, one row for each picture of a prompt, the first rows of a long list."""
    rows = [(p, n) for p in range(len(prompts)) for n in range(config.images_per_prompt)][:GRID_ROWS]
    columns = config.columns()
    cells = [
        [open_picture(root, f"{stage}/{picture_name(one, *row)}.png") for one in columns] for row in rows
    ]
    return grid_png(
        Grid(
            cells=cells,
            rows=[prompts[number] if n == 0 else "" for number, n in rows],
            columns=[COLUMN_WORDS.get(column, column.replace("_", " ")) for column in columns],
            cell=cell_edge(cells[0][0]),
        )
    )
