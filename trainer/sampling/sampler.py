"""The sampler that people and stages use: requests in, pictures with their neighbors out.

Opens `runs/<name>/train` (model, recipe, manifest), the CLIP encoder, the autoencoder and any databases
below one root; refuses parts that were not made for each other. Batches run side by side in threads,
because torch leaves Python while it computes.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from retrieval.cli.contact_sheet import decoded
from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.model.autoencoder import Autoencoder
from trainer.model.context import Vectors
from trainer.recipe import AutoencoderConfig, DiffusionConfig
from trainer.sampling.batches import Batch, make_batches
from trainer.sampling.conditioning import Sources, condition
from trainer.sampling.denoising import Denoiser, guided_sample, initial_noise, make_scheduler, weighed
from trainer.sampling.picture import to_pictures
from trainer.sampling.pseudo_queries import PseudoQueries
from trainer.sampling.recipe import Compute
from trainer.sampling.request import TRAINING_DATABASE, ImageQuery, Request, Sample

MAX_WORKERS = 4
"""Each worker holds the activations of a batch; beyond a few, threads inside torch do as well."""


class Trained(Config):
    """A trained model, with the encoder and the autoencoder that it was trained on."""

    name: str
    """The run's folder below `runs/`."""
    clip: ClipConfig
    autoencoder: AutoencoderConfig

    @property
    def folder(self) -> str:
        """Where `train` left the model, relative to the root."""
        return f"runs/{self.name}/train"


class Sampler:
    """An opened model. `plan` retrieves and batches, `draw` computes, `sample` does both."""

    def __init__(self, root: Root, trained: Trained, compute: Compute) -> None:
        """Load every part. Raises UserError where one is missing or was made for another."""
        from diffusers import UNet2DConditionModel

        self.root = root
        self.compute = compute
        self.device = pick_device(compute.device)
        self.manifest = read_manifest(root, trained.folder)
        self.encoder = Encoder.load(trained.clip, str(self.device))
        self.autoencoder = Autoencoder.load(trained.autoencoder, str(self.device))
        self._require_parts(root.at(trained.folder))
        self.diffusion = DiffusionConfig(**root.read_json(f"{trained.folder}/recipe.json")["diffusion"])
        channels, height, width = self.manifest.values["latent_shape"]
        self.latent_shape = (int(channels), int(height), int(width))
        """Of a picture of the size of training."""
        with _local_folder(root, f"{trained.folder}/model") as folder:
            unet = UNet2DConditionModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        self.downsampling = 2 ** (len(unet.config.block_out_channels) - 1)
        # weights keep requires_grad: autocast remembers its bf16 copies of no others
        unet = unet.to(self.device).eval()
        self.unet: Denoiser = torch.compile(unet) if compute.compile else unet
        self._databases: dict[str, Database] = {}

    @classmethod
    def open(cls, root: Root, trained: Trained, compute: Compute | None = None) -> "Sampler":
        """The same as the constructor, computing by default settings unless told otherwise."""
        return cls(root, trained, compute or Compute())

    def database(self, name: str) -> Database:
        """A database by name, opened once. Raises UserError if it is missing or of another encoder."""
        if name not in self._databases:
            database = open_database(self.root, name)
            database.require_encoder(self.encoder.identity)
            self._databases[name] = database
        return self._databases[name]

    def image_query(self, name: str, data: bytes) -> ImageQuery:
        """A picture's file as something to condition on. Raises UserError if it cannot be read."""
        return ImageQuery.of(name, data, self.encoder.encode_images([decoded(name, data)])[0])

    @cached_property
    def _pseudo_queries(self) -> PseudoQueries:
        return PseudoQueries(self.root)

    def _pseudo_query(self, seed: int, top_m: float) -> tuple[int, Vectors]:
        return self._pseudo_queries.draw(seed, top_m)

    @cached_property
    def parts(self) -> dict[str, str]:
        """What a sample's recipe says of its makers: checksums, and the number format."""
        sums = self.manifest.checksums()
        (model,) = [sums[name] for name in sums if name.endswith("/diffusion_pytorch_model.safetensors")]
        return {
            "model": model,
            "encoder": self.encoder.identity.weights,
            "autoencoder": self.autoencoder.identity,
            "precision": self.compute.precision,
        }

    def check(self, requests: Sequence[Request]) -> None:
        """Raises UserError for a request that this model cannot serve; opens the databases it names."""
        for request in requests:
            if not 1 <= request.steps < self.diffusion.steps:
                raise UserError(f"steps must be 1 to {self.diffusion.steps - 1}, got {request.steps}")
            request.check()
            self.shape_of(request)
            for name in request.shares():
                self.database(name)
            dim = self.encoder.identity.dim
            if strange := [one.name for one in request.images if one.embedding.shape != (dim,)]:
                raise UserError(f"image {strange[0]!r} was embedded by another encoder: wanted {dim} numbers")
            for one in request.images:
                if not 0 < np.linalg.norm(one.embedding) < np.inf:  # not so for nan either
                    raise UserError(f"the vector of image {one.name!r} is zero or not finite: embed it again")
            if request.mode == "unconditional":
                self._pseudo_queries  # noqa: B018 - an error comes before any work

    def shape_of(self, request: Request) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a request's picture. Raises UserError for pixels that do not divide."""
        channels, height, width = self.latent_shape
        factor, grain = self.autoencoder.factor, self.autoencoder.factor * self.downsampling
        for word, pixels in (("height", request.height), ("width", request.width)):
            if pixels < 0 or pixels % grain:
                below = max(0, pixels // grain * grain)
                raise UserError(
                    f"{word} must be a multiple of {grain} pixels (the autoencoder's factor {factor} times "
                    f"the UNet's downsampling {self.downsampling}), got {pixels}. Use "
                    f"{f'{below} or ' if below else ''}{below + grain}, or 0 for the size of training."
                )
        return channels, request.height // factor or height, request.width // factor or width

    def plan(self, requests: Sequence[Request]) -> list[Batch]:
        """Retrieve the neighbors of all requests and batch them. Raises UserError for a request in error."""
        self.check(requests)
        sources = Sources(self.encoder.encode_texts, self.database, self._pseudo_query)
        return make_batches(condition(requests, sources), self.compute.batch_size)

    def draw(self, batches: Iterable[Batch]) -> Iterator[list[Sample]]:
        """The samples of each batch, in order. A generator of batches is read a few ahead."""
        workers, threads = self._shares(len(batches) if isinstance(batches, Sized) else None)
        before = torch.get_num_threads()
        waiting: deque[Future[list[Sample]]] = deque()
        pool = ThreadPoolExecutor(workers, "sampler", torch.set_num_threads, (threads,))
        try:
            for batch in batches:
                waiting.append(pool.submit(self.compute_batch, batch))
                # two for each worker: one is computed while the next is planned and the last is stored
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def sample(
        self, requests: Sequence[Request], tell: Callable[[int], object] = lambda count: None
    ) -> list[Sample]:
        """One sample for each request, in their order. `tell` hears the size of each finished batch."""
        batches = self.plan(requests)
        ordered: dict[int, Sample] = {}
        for batch, samples in zip(batches, self.draw(batches), strict=True):
            ordered.update(zip(batch.positions, samples, strict=True))
            tell(len(samples))
        return [ordered[position] for position in range(len(requests))]

    @torch.inference_mode()
    def compute_batch(self, batch: Batch) -> list[Sample]:
        """The samples of one batch, in its order."""
        requests = [item.request for item in batch.items]
        scheduler = make_scheduler(requests[0].scheduler, requests[0].steps, self.diffusion)
        noise = initial_noise([request.seed for request in requests], self.shape_of(requests[0]))
        noise = noise.to(self.device)
        context = torch.from_numpy(batch.contexts).to(self.device)
        unet = self.unet
        if batch.weights is not None:
            unet = weighed(unet, torch.from_numpy(batch.weights).to(self.device))
        guidance = torch.tensor([request.guidance for request in requests], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute.precision == "bf16"):
            latents = guided_sample(unet, scheduler, noise, context, guidance)
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(finite):
            worst = requests[finite.index(False)]
            raise UserError(
                f"sampling {worst.prompt!r} with seed {worst.seed} and guidance {worst.guidance} left the "
                f"range of {self.compute.precision}. Lower the guidance, use fp32, or train the model longer."
            )
        pictures = to_pictures(self.autoencoder.decode(latents).float().cpu().numpy())
        return [
            Sample(item.request, picture, item.neighbors, self.parts, item.pseudo_query)
            for item, picture in zip(batch.items, pictures, strict=True)
        ]

    def _require_parts(self, where: str) -> None:
        trained_on, encoder = EncoderIdentity(**self.manifest.values["encoder"]), self.encoder.identity
        if trained_on != encoder:
            raise UserError(
                f"{where} was trained on embeddings of encoder {trained_on.model} ({trained_on.weights}), "
                f"[clip] is {encoder.model} ({encoder.weights}). Set [clip] to the model's, or train again."
            )
        latents_of, autoencoder = self.manifest.values["autoencoder"], self.autoencoder.identity
        if latents_of != autoencoder:
            raise UserError(
                f"{where} was trained on latents of autoencoder {latents_of}, "
                f"[autoencoder] is {autoencoder}. Set [autoencoder] to the model's, or train again."
            )

    def _shares(self, batches: int | None) -> tuple[int, int]:
        """Workers, and threads of each. Many one-thread workers beat one worker of many threads."""
        cpus = len(os.sched_getaffinity(0))
        most = 1 if self.device.type == "cuda" else min(cpus, MAX_WORKERS)
        workers = self.compute.workers or max(1, most if batches is None else min(most, batches))
        return workers, self.compute.threads or max(1, cpus // workers)


def upstream_of(root: Root, trained: Trained, databases: Iterable[str]) -> dict[str, str]:
    """Fingerprints of a model and of databases, read without loading any weights."""
    prints = {f"database/{name}": open_database(root, name).manifest.fingerprint for name in databases}
    return {"train": read_manifest(root, trained.folder).fingerprint, **prints}


def open_database(root: Root, name: str) -> Database:
    """The database `databases/<name>` below a root, or the training database for `index`."""
    folder = name if name == TRAINING_DATABASE else f"databases/{name}"
    # a name may come from a page: it never leaves the folder
    if "/" in name or name in ("", ".", "..") or not root.exists(f"{folder}/manifest.json"):
        there = ", ".join(database_names(root)) or "none"
        raise UserError(f"there is no database {name!r} at {root.at(folder)}; there are: {there}.")
    return Database.open(root.child(folder))


def database_names(root: Root) -> list[str]:
    """Names of the databases below a root, sorted, without the training database."""
    names = (name.split("/") for name in root.list("databases", "/manifest.json"))
    return sorted(parts[1] for parts in names if len(parts) == 3)


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is the GPU if there is one. Raises UserError for one that is not."""
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
    with tempfile.TemporaryDirectory(prefix="rdm-") as scratch:
        for name in root.list(folder):
            with root.local(name) as path:
                shutil.move(path, Path(scratch) / Path(name).name)
        yield Path(scratch)
