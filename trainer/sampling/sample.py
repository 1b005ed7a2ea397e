"""sample: generates pictures of prompts with neighbors from databases.

Reads `runs/<name>/train`, `databases/*` and `index`. Writes below `runs/<name>/sample/` `<database>/<prompt>-<n>.png`
with the recipe in its metadata, a `.json` file with the neighbors of each picture, and `grid.png` (prompts, databases).
Another database gives another style without training.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from retrieval.errors import UserError
from retrieval.recipe import Precision
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import FileRecord, Root
from trainer.sampling.batches import SamplingBatch
from trainer.sampling.picture import Grid, cell_edge, grid_png, open_picture
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.request import TRAINING_DATABASE, Request, Sample, SourceImage, prompts_digest
from trainer.sampling.resumable import ALL, Distribute, Part, ResumableItems, draw_alone
from trainer.sampling.sampler import Sampler, TrainedModel, upstream_fingerprints
from trainer.sampling.signing import picture_credentials, sample_png

if TYPE_CHECKING:
    from retrieval.provenance import Credentials

log = logging.getLogger("sample")

GRID_ROWS = 24
COLUMN_LABELS = {TRAINING_DATABASE: "training database", "text": "text alone"}


@dataclass(frozen=True)
class NamedRequest:
    """A request and the name of its picture below the stage's folder, without suffix."""

    name: str
    request: Request


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a configuration."""

    conditions: dict[str, bytes]
    """Images to condition on, by path."""
    sources: dict[str, Any]
    """Of `init_image` and `mask` those that are set, as SourceImage, by name."""

    @classmethod
    def of(cls, config: SampleConfig) -> "ImageFiles":
        """Read the files. Raises UserError if one cannot be read."""
        paths = {name: path for name, path in (("init_image", config.init_image), ("mask", config.mask)) if path}
        sources = {name: SourceImage.of(Path(path).name, read_image(path)) for name, path in paths.items()}
        return cls({path: read_image(path) for path in config.images}, sources)

    def inputs(self, sampler: Sampler) -> dict[str, Any]:
        """The fields of a request that depend on files."""
        images = tuple(sampler.image_query(Path(path).name, data) for path, data in self.conditions.items())
        return {"images": images, **self.sources}

    def digests(self) -> dict[str, str]:
        """A digest of each file, by its use."""
        conditions = {f"image/{path}": sha256(data).hexdigest()[:16] for path, data in self.conditions.items()}
        return conditions | {name: source.sha256[:16] for name, source in self.sources.items()}


@dataclass(frozen=True)
class Drawing:
    """The pictures of the stage, ready to be drawn."""

    sampler: Sampler
    requests: list[NamedRequest]
    items: ResumableItems
    credentials: "Credentials | None"

    @cached_property
    def batches(self) -> list[SamplingBatch]:
        """Retrieves the neighbors of all requests once."""
        return self.sampler.plan([named.request for named in self.requests])

    def draw(self, part: Part) -> list[ShardRecord]:
        """Draw the batches of a part that have no record yet. Returns the records of the part, in order."""
        numbers = part.of(range(len(self.batches)))
        # A record's name holds the batch size: with another size a batch has other pictures.
        names = {number: f"{self.sampler.compute.batch_size:04d}-{number:05d}" for number in numbers}
        records = {number: record for number in numbers if (record := self.items.read_record(names[number]))}
        missing = [number for number in numbers if number not in records]
        total, count = (sum(len(self.batches[number].items) for number in some) for some in (numbers, missing))
        started, drawn = time.monotonic(), self.sampler.draw(self.batches[number] for number in missing)
        with tqdm(total=total, initial=total - count, desc="sample", unit="image", mininterval=0.5) as bar:
            for number, samples in zip(missing, drawn, strict=True):
                self.items.require_begun()
                pictures = [self.requests[position].name for position in self.batches[number].positions]
                files = [file for pair in zip(pictures, samples, strict=True) for file in self._write(*pair)]
                records[number] = self.items.write_record(names[number], files, len(samples))
                bar.update(len(samples))
        seconds = time.monotonic() - started
        log.info(f"sample: {count} images  {seconds:.1f} s  {count / max(seconds, 1e-9):.2f} images/s")
        return [records[number] for number in numbers]

    def _write(self, name: str, sample: Sample) -> list[FileRecord]:
        path, root = f"{self.items.stage}/{name}", self.items.root
        return [
            root.write_bytes(f"{path}.png", sample_png(sample, self.credentials)),
            root.write_json(f"{path}.json", sample.detailed_recipe()),
        ]


def run(config: SampleConfig, trained: TrainedModel, root: Root, distribute: Distribute = draw_alone) -> Manifest:
    """Sample all prompts and databases of the configuration. Finished batches of an earlier run are kept.

    distribute: lets other processes draw parts, which call `draw_part`.
    """
    started = time.monotonic()
    prompts, files = config.all_prompts(), ImageFiles.of(config)
    items = _items(config, trained, root, prompts, files)
    if (finished := items.finished_manifest()) is not None:
        log.info(f"sample: {root.at(items.stage)} is finished")
        return finished
    drawing = _open(config, trained, items, prompts, files)
    with items.building():
        distribute(drawing.draw)
        records = drawing.draw(ALL)
        grid = root.write_bytes(f"{items.stage}/grid.png", _grid(config, prompts, items))
        values = {**drawing.sampler.model_identity, "prompts": list(prompts), "columns": list(config.columns())}
        return items.finish([*records, ShardRecord("grid", 1, (grid,))], values, time.monotonic() - started)


def draw_part(config: SampleConfig, trained: TrainedModel, root: Root, part: Part) -> None:
    """Draw a part of the pictures of a stage that `run` has begun in another process.

    Raises UserError if that process began it with other settings, inputs or files.
    """
    prompts, files = config.all_prompts(), ImageFiles.of(config)
    items = _items(config, trained, root, prompts, files)
    items.require_begun()
    _open(config, trained, items, prompts, files).draw(part)


def _items(
    config: SampleConfig, trained: TrainedModel, root: Root, prompts: Sequence[str], files: ImageFiles
) -> ResumableItems:
    own = {"prompts": prompts_digest(prompts), **files.digests()}
    upstream = upstream_fingerprints(root, trained, config.searched_databases())
    if config.mode == "unconditional":
        upstream["neighbors"] = read_manifest(root, "neighbors").identity
    return ResumableItems(root, f"runs/{trained.name}/sample", config, upstream | own)


def _open(
    config: SampleConfig, trained: TrainedModel, items: ResumableItems, prompts: Sequence[str], files: ImageFiles
) -> Drawing:
    """Load the model and check all requests. Raises UserError."""
    credentials = picture_credentials(config)
    sampler = Sampler.open(items.root, trained, config)
    requests = make_requests(config, prompts, files.inputs(sampler))
    sampler.check([named.request for named in requests])
    return Drawing(sampler, requests, items, credentials)


def sample_prompt(config: SampleConfig, trained: TrainedModel, root: Root, prompt: str) -> Sample:
    """One picture of a prompt with the first database of the configuration; writes nothing."""
    sampler, request = open_prompt(config, trained, root, prompt)
    (sample,) = sampler.sample([request])
    return sample


def open_prompt(config: SampleConfig, trained: TrainedModel, root: Root, prompt: str) -> tuple[Sampler, Request]:
    """The model, and the request for a picture of a prompt with the first database of the configuration."""
    files = ImageFiles.of(config)
    request = replace(config.request_for(prompt, config.seed, config.columns()[0]), **files.sources)
    if prompt or not files.conditions:
        request.check()
    sampler = Sampler.open(root, trained, config)
    return sampler, replace(request, **files.inputs(sampler))


def reproduce(config: SampleConfig, trained: TrainedModel, root: Root, recipe: dict[str, Any]) -> Sample:
    """Sample the picture of a recipe again; if it was drawn from a picture, from the file that `config` names.

    Raises UserError if the model, the neighbors or the file differ.
    """
    sampler, request = open_recipe(config, trained, root, recipe)
    (sample,) = sampler.sample([request])
    require_neighbors(sample, recipe)
    return sample


def open_recipe(
    config: SampleConfig, trained: TrainedModel, root: Root, recipe: dict[str, Any]
) -> tuple[Sampler, Request]:
    """The model and the request of a picture's recipe. Raises UserError if the model or the file differ."""
    request, precision = _with_sources(Request.from_recipe(recipe), config), recipe.get("precision")
    if precision not in get_args(Precision):
        wanted = " or ".join(map(repr, get_args(Precision)))
        raise UserError(f"not the recipe of a sample: field precision is {precision!r}, wanted {wanted}.")
    _neighbor_ids(recipe)
    sampler = Sampler.open(root, trained, config.model_copy(update={"precision": precision}))
    changed = [name for name, digest in sampler.model_identity.items() if recipe.get(name) != digest]
    if changed:
        raise UserError(
            f"the recipe has another {' and '.join(changed)} than run {trained.name!r}. Set train.name, "
            "[clip] and [autoencoder] to those of the picture."
        )
    return sampler, request


def require_neighbors(sample: Sample, recipe: dict[str, Any]) -> None:
    """Raises UserError unless a sample has the neighbors that a recipe lists."""
    if _neighbor_ids(recipe) != [neighbor.image_id for neighbor in sample.neighbors]:
        raise UserError("the databases have changed: retrieval returns other neighbors than the recipe lists.")


def _neighbor_ids(recipe: dict[str, Any]) -> list[int]:
    """The image ids of a recipe's neighbors. Raises UserError if they are not a list of pairs."""
    neighbors = recipe.get("neighbors")
    try:
        return [image_id for image_id, _ in neighbors]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        found = repr(neighbors)[:80]
        raise UserError(
            f"not the recipe of a sample: field neighbors is {found}, wanted pairs of id and similarity."
        ) from error


def _with_sources(request: Request, config: SampleConfig) -> Request:
    """The request with the content of the files that it starts from. Raises UserError unless `config` names them."""
    sources: dict[str, Any] = {}
    for name in ("init_image", "mask"):
        wanted, path = getattr(request, name), getattr(config, name)
        if wanted is None:
            continue
        sources[name] = SourceImage.of(Path(path).name, read_image(path)) if path else None
        if sources[name] != wanted:
            raise UserError(
                f"the picture was drawn with {name} {wanted.name!r} (SHA-256 {wanted.sha256}), found {path!r}. "
                "Name the same file."
            )
    return replace(request, **sources)


def read_image(name: str) -> bytes:
    """Bytes of an image file. Raises UserError if it cannot be read."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"image {name!r} cannot be read: {error}") from error


def make_requests(config: SampleConfig, prompts: Sequence[str], inputs: Mapping[str, Any]) -> list[NamedRequest]:
    """Requests of all pictures of the stage: by prompt, then number, then database. inputs: further fields of each."""
    return [
        NamedRequest(
            picture_name(column, number, n), replace(config.request_for(prompt, config.seed + n, column), **inputs)
        )
        for number, prompt in enumerate(prompts)
        for n in range(config.images_per_prompt)
        for column in config.columns()
    ]


def picture_name(column: str, prompt: int, n: int) -> str:
    """Name of a picture below the stage's folder, without suffix."""
    return f"{column}/{prompt:04d}-{n:02d}"


def _grid(config: SampleConfig, prompts: Sequence[str], items: ResumableItems) -> bytes:
    """Grid of prompts by databases, one row per picture of a prompt; at most the first GRID_ROWS rows."""
    rows = [(p, n) for p in range(len(prompts)) for n in range(config.images_per_prompt)][:GRID_ROWS]
    columns = config.columns()
    names = [[f"{items.stage}/{picture_name(column, *row)}.png" for column in columns] for row in rows]
    cells = [[open_picture(items.root, name) for name in row] for row in names]
    row_labels = [prompts[number] if n == 0 else "" for number, n in rows]
    column_labels = [COLUMN_LABELS.get(column, column.replace("_", " ")) for column in columns]
    return grid_png(Grid(cells, row_labels, column_labels, cell=cell_edge(cells[0][0])))
