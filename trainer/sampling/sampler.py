"""`Sampler`: takes requests, returns pictures with their neighbors.

Opens `runs/<name>/train` (model, recipe, manifest), the CLIP encoder, the autoencoder and databases below one root, and
checks that they belong together. Batches are computed in parallel threads, since torch releases Python's global lock.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.pictures.picture_file import decode_picture
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.model.autoencoder import Autoencoder
from trainer.model.context import Vectors
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig
from trainer.model.schedulers import check_steps, make_scheduler
from trainer.sampling.batches import SamplingBatch, make_batches
from trainer.sampling.conditioning import ConditioningSources, condition
from trainer.sampling.denoising import (
    Denoiser,
    ImageToImage,
    SourceLatents,
    guidance_within,
    guided_sample,
    initial_noise,
    padded,
    with_token_weights,
)
from trainer.sampling.picture import to_pictures
from trainer.sampling.pseudo_queries import PseudoQueries
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import ImageQuery, Request, Sample, database_folder
from trainer.sampling.resumable import hidden_lists
from trainer.sampling.truncation import TruncationWarnings

UNIT_TOLERANCE = 1e-4
"""Lengths of normalized float32 vectors differ from 1 by less."""
MAX_WORKERS = 4
"""Each worker holds the activations of one batch. Beyond a few, threads inside torch are as fast."""


class TrainedModel(Config):
    """A trained model, with the encoder and the autoencoder used in training."""

    name: str
    """Name of the run: its folder below `runs/`."""
    clip: ClipConfig
    autoencoder: AutoencoderConfig

    @property
    def folder(self) -> str:
        """Folder of the trained model, relative to the root."""
        return f"runs/{self.name}/train"


class Sampler:
    """An opened model. `plan` retrieves neighbors and forms batches, `draw` computes them; `sample`: both."""

    def __init__(self, root: Root, trained: TrainedModel, compute: ComputeConfig) -> None:
        """Load all parts. Raises UserError if one is missing or the parts do not belong together."""
        from diffusers import UNet2DConditionModel

        self.root = root
        self.compute = compute
        self.device = pick_device(compute.device)
        self.manifest = read_manifest(root, trained.folder)
        self.encoder = Encoder(trained.clip, str(self.device))
        self._truncation_warnings = TruncationWarnings(self.encoder)
        self.autoencoder = Autoencoder.load(trained.autoencoder, str(self.device))
        self._check_parts(root.at(trained.folder))
        recipe = root.read_json(f"{trained.folder}/recipe.json")
        self.diffusion = DiffusionConfig(**recipe["diffusion"])
        self.context_norm = ModelConfig(**recipe["model"]).context_norm
        """Length of the CLIP vectors that the model takes."""
        channels, height, width = self.manifest.values["latent_shape"]
        self.latent_shape = (int(channels), int(height), int(width))
        """(channels, height, width) of a latent at training size."""
        with _local_folder(root, f"{trained.folder}/model") as folder:
            unet = UNet2DConditionModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        self.downsampling = 2 ** (len(unet.config.block_out_channels) - 1)
        # autocast caches its bf16 copies only of weights with requires_grad
        unet = unet.to(self.device).eval()
        self.unet: Denoiser = torch.compile(unet) if compute.compile else unet
        self.databases: dict[str, Database] = {}
        """The opened databases, by name."""

    @classmethod
    def open(cls, root: Root, trained: TrainedModel, compute: ComputeConfig | None = None) -> "Sampler":
        """The constructor with default compute settings; raises as it does."""
        return cls(root, trained, compute or ComputeConfig())

    def database(self, name: str) -> Database:
        """A database by name, opened once. Raises UserError if it is missing or has another encoder."""
        if name not in self.databases:
            database = open_database(self.root, name)
            database.require_encoder(self.encoder.identity)
            self.databases[name] = database
        return self.databases[name]

    def image_query(self, name: str, data: bytes) -> ImageQuery:
        """Encode an image file as a query. Raises UserError if it cannot be decoded."""
        vectors = self.encoder.encode_images([decode_picture(name, data)], unit=False)
        return ImageQuery.from_file(name, data, vectors[0])

    @cached_property
    def _pseudo_queries(self) -> PseudoQueries:
        return PseudoQueries(self.root)

    def _pseudo_query(self, seed: int, top_m: float) -> tuple[int, Vectors]:
        return self._pseudo_queries.draw(seed, top_m)

    @cached_property
    def model_identity(self) -> dict[str, str]:
        """Checksums of model, encoder and autoencoder, and the number format; stored in each recipe."""
        checksums = self.manifest.checksums()
        (model,) = [
            checksum for name, checksum in checksums.items() if name.endswith("/diffusion_pytorch_model.safetensors")
        ]
        return {
            "model": model,
            "encoder": self.encoder.identity.weights,
            "autoencoder": self.autoencoder.identity,
            "precision": self.compute.precision,
        }

    def check(self, requests: Sequence[Request]) -> None:
        """Open all databases that requests name. Raises UserError for a request this model cannot serve."""
        for request in requests:
            check_steps(request.scheduler, request.steps, self.diffusion)
            request.check()
            self.latent_shape_of(request)
            for name in request.database_weights():
                self.database(name)
            for image in request.images:
                self._check_image(image)
        if any(request.mode == "unconditional" for request in requests):
            self._pseudo_queries = self._pseudo_queries.newest()  # without images that were hidden since

    def _check_image(self, image: ImageQuery) -> None:
        shape, dim = image.embedding.shape, self.encoder.identity.dim
        if shape != (dim,):
            raise UserError(
                f"image {image.name!r} was embedded by another encoder: its vector has shape {shape}, "
                f"wanted ({dim},). Embed it again."
            )
        length = np.linalg.norm(image.embedding)
        if not 0 < length < np.inf:  # also true for nan
            raise UserError(f"the vector of image {image.name!r} is zero or not finite: embed it again")
        if self.context_norm == "raw" and abs(length - 1) < UNIT_TOLERANCE:
            raise UserError(
                f"the vector of image {image.name!r} has length 1, but the model takes vectors as CLIP gives them "
                '(model.context_norm = "raw"). Embed the picture again.'
            )

    def latent_shape_of(self, request: Request) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a request's picture. Raises UserError if its size is not a multiple."""
        channels, height, width = self.latent_shape
        factor, multiple = self.autoencoder.factor, self.autoencoder.factor * self.downsampling
        for side, pixels in (("height", request.height), ("width", request.width)):
            if pixels < 0 or pixels % multiple:
                below = max(0, pixels // multiple * multiple)
                raise UserError(
                    f"{side} must be a multiple of {multiple} pixels (the autoencoder's factor {factor} "
                    f"times the UNet's downsampling {self.downsampling}), got {pixels}. Use "
                    f"{f'{below} or ' if below else ''}{below + multiple}, or 0 for the training size."
                )
        return channels, request.height // factor or height, request.width // factor or width

    def plan(self, requests: Sequence[Request]) -> list[SamplingBatch]:
        """Retrieve neighbors of all requests and form batches. Raises UserError for an invalid request."""
        self.check(requests)
        self._truncation_warnings.warn(requests)
        encode = partial(self.encoder.encode_texts, unit=False)
        sources = ConditioningSources(encode, self.database, self._pseudo_query, self.context_norm)
        return make_batches(condition(requests, sources), self.compute.batch_size)

    def draw(self, batches: Iterable[SamplingBatch]) -> Iterator[list[Sample]]:
        """The samples of each batch, in order. Reads at most two batches ahead for each worker."""
        workers, threads = self._workers_and_threads(len(batches) if isinstance(batches, Sized) else None)
        torch_threads = torch.get_num_threads()
        pending: deque[Future[list[Sample]]] = deque()
        pool = ThreadPoolExecutor(workers, "sampler", torch.set_num_threads, (threads,))
        try:
            for batch in batches:
                pending.append(pool.submit(self.compute_batch, batch))
                # Two per worker: one is computed while the next is planned and the previous one is stored.
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch_threads)

    def sample(
        self, requests: Sequence[Request], on_batch: Callable[[int], object] = lambda count: None
    ) -> list[Sample]:
        """One sample per request, in order; raises as `plan`, `compute_batch`. on_batch: gets the size of a batch."""
        batches = self.plan(requests)
        ordered: dict[int, Sample] = {}
        for batch, samples in zip(batches, self.draw(batches), strict=True):
            ordered.update(zip(batch.positions, samples, strict=True))
            on_batch(len(samples))
        return [ordered[position] for position in range(len(requests))]

    @torch.inference_mode()
    def compute_batch(self, batch: SamplingBatch) -> list[Sample]:
        """The samples of one batch, in order. Raises UserError if a latent is not finite."""
        latents = self._denoise(batch)
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(finite):
            failed = batch.items[finite.index(False)].request
            raise UserError(
                f"sampling {failed.prompt!r} with seed {failed.seed} and guidance {failed.guidance} left the "
                f"range of {self.compute.precision}. Lower the guidance, use fp32, or train the model longer."
            )
        pictures = to_pictures(self.autoencoder.decode(latents).float().cpu().numpy())
        return [
            Sample(
                item.request,
                picture,
                item.neighbors,
                self.model_identity,
                item.pseudo_query,
                {name: self.database(name).manifest.identity for name in item.request.database_weights()},
            )
            for item, picture in zip(batch.items, pictures, strict=True)
        ]

    def _denoise(self, batch: SamplingBatch) -> torch.Tensor:
        """Latents (n, c, h, w) float32 of a batch."""
        requests = [item.request for item in batch.items]
        shape = self.latent_shape_of(requests[0])
        noise = initial_noise([request.seed for request in requests], shape).to(self.device)
        scheduler = make_scheduler(requests[0].scheduler, requests[0].steps, self.diffusion)
        if (source := self._source_latents(batch, shape)) is not None:
            scheduler = from_source = ImageToImage(scheduler, source, noise)
            noise = from_source.start()
        context = torch.from_numpy(batch.contexts).to(self.device)
        if batch.negatives is not None:
            negatives = torch.from_numpy(batch.negatives).to(self.device)
            context = torch.cat([negatives[:, None].expand_as(context), context])
        unet, weights = self.unet, None if batch.weights is None else torch.from_numpy(batch.weights).to(self.device)
        if self.compute.compile:
            # The same network for every number of tokens, with or without weights: it is compiled once.
            context, weights = padded(context, noise.new_ones(batch.contexts.shape[:2]) if weights is None else weights)
        if weights is not None:
            unet = with_token_weights(unet, weights)
        guidance = torch.tensor([request.guidance for request in requests], device=self.device)
        interval = requests[0].guidance_interval
        guidance = guidance_within(interval, guidance, scheduler.timesteps, self.diffusion.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute.precision == "bf16"):
            return guided_sample(unet, scheduler, noise, context, guidance)

    def _source_latents(self, batch: SamplingBatch, shape: tuple[int, int, int]) -> SourceLatents | None:
        """The latents that a batch starts from, the means of the autoencoder's posterior; None: noise."""
        factor = self.autoencoder.factor
        size = shape[2] * factor, shape[1] * factor
        pixels, masks = batch.source_pixels(size), batch.masks(size, factor)
        if pixels is None:
            return None
        latents = self.autoencoder.encode_moments(torch.from_numpy(pixels)).chunk(2, dim=1)[0]
        mask = None if masks is None else torch.from_numpy(masks).to(self.device)
        return SourceLatents(latents, batch.items[0].request.strength, mask)

    def _check_parts(self, folder: str) -> None:
        expected, encoder = EncoderIdentity(**self.manifest.values["encoder"]), self.encoder.identity
        if encoder != expected:
            raise UserError(
                f"{folder} was trained on embeddings of encoder {expected.model} ({expected.weights}), "
                f"[clip] is {encoder.model} ({encoder.weights}). Set [clip] to the model's, or train again."
            )
        expected_autoencoder, autoencoder = self.manifest.values["autoencoder"], self.autoencoder.identity
        if autoencoder != expected_autoencoder:
            raise UserError(
                f"{folder} was trained on latents of autoencoder {expected_autoencoder}, "
                f"[autoencoder] is {autoencoder}. Set [autoencoder] to the model's, or train again."
            )

    def _workers_and_threads(self, batches: int | None) -> tuple[int, int]:
        """Number of workers and of threads per worker. Many workers with one thread each are fastest."""
        cpus = len(os.sched_getaffinity(0))
        limit = 1 if self.device.type == "cuda" else min(cpus, MAX_WORKERS)
        workers = self.compute.workers or max(1, limit if batches is None else min(limit, batches))
        return workers, self.compute.threads or max(1, cpus // workers)


def upstream_fingerprints(root: Root, trained: TrainedModel, databases: Sequence[str]) -> dict[str, str]:
    """Fingerprint of a model, identities of databases and their hidden images, by name. Loads no weights."""
    # Added and deleted rows change the identity of a database, not its fingerprint; hidden images neither.
    identities = {f"database/{name}": open_database(root, name).manifest.identity for name in databases}
    hidden = hidden_lists(root, map(database_folder, databases))
    return {"train": read_manifest(root, trained.folder).fingerprint, **identities, **hidden}


def open_database(root: Root, name: str) -> Database:
    """The database `databases/<name>`, or the training database for `index`. Raises UserError if missing."""
    folder = database_folder(name)
    # The name may come from a web request: it must not leave the folder.
    if "/" in name or name in ("", ".", "..") or not root.exists(f"{folder}/manifest.json"):
        known = ", ".join(database_names(root)) or "none"
        raise UserError(f"there is no database {name!r} at {root.at(folder)}; there are: {known}.")
    return Database.open(root.child(folder))


def database_names(root: Root) -> list[str]:
    """Names of the databases below a root, sorted, without the training database."""
    names = (name.split("/") for name in root.list("databases", "/manifest.json"))
    return sorted(parts[1] for parts in names if len(parts) == 3)


def pick_device(name: str) -> torch.device:
    """The torch device; `auto` is the GPU if there is one. Raises UserError if torch sees no GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device = {name!r}, but torch sees no GPU. Use 'auto' or 'cpu'.")
    return torch.device(name)


@contextmanager
def _local_folder(root: Root, folder: str) -> Iterator[Path]:
    if root.is_local:
        yield root.local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="rdm-") as temporary:
        for name in root.list(folder):
            with root.local(name) as path:
                shutil.move(path, Path(temporary) / Path(name).name)
        yield Path(temporary)
