"""Training: what each rank does from the recipe to the exported weights.

Reads neighbors and latents (or images) through `trainer.data.loader`; writes checkpoints, metrics and at the
end the model and the manifest below `runs/<name>/train/`. The same command resumes after any stop, and
a resumed run equals one that was never stopped: every random choice is a function of seed and step.
"""

import fcntl
import logging
import os
import time

import torch

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.checkpoint.export import export, read_model
from trainer.data.loader import Loader
from trainer.data.plan import Plan, is_finished, make_plan
from trainer.engine.deepspeed_engine import Ranks, join_ranks, leave_ranks, make_engine
from trainer.engine.ema import Average
from trainer.engine.fragments import MASTER, owned
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.recipe import Training
from trainer.tracking.boards import import_wandb, open_boards
from trainer.tracking.flops import make_gauge
from trainer.tracking.progress import Progress
from trainer.training.disk import check_shared, check_space
from trainer.training.launch import TERMINATED, die_with_parent
from trainer.training.loop import Session, Termination, train_steps
from trainer.training.objective import Objective
from trainer.training.review import Review

log = logging.getLogger("train")


def prepare(config: Training, root: Root) -> Plan:
    """Everything that can be refused before a process group exists. Raises UserError."""
    # Only a local disk can be locked, and read in slices.
    root.local_path(config.train.folder)
    if config.train.wandb:
        import_wandb()
    plan = make_plan(config, root, Autoencoder.load(config.autoencoder, "cpu"))
    if not config.train.restart:
        checkpoints_of(plan, root).check(config.train.steps)
    if not is_finished(plan, root):
        check_space(plan, root)
    return plan


def run(config: Training, root: Root) -> None:
    """Train on all ranks together; each rank calls it. Exits with code 143 after SIGTERM and a checkpoint."""
    plan = prepare(config, root)
    if is_finished(plan, root):
        log.info(f"{root.at(config.train.folder)} is finished")
        return
    die_with_parent()
    began, termination = time.monotonic(), Termination()
    ranks = join_ranks()
    lock = take_folder(plan, root) if ranks.is_first else None
    check_shared(lock, root.local_path(f"{config.train.folder}/lock"), ranks)
    torch.manual_seed(config.train.seed)
    unet = build_unet(config.model)
    if config.train.start_from:
        unet.load_state_dict(read_model(root, f"runs/{config.train.start_from}/train"), strict=True)
    shapes = {name: weight.shape for name, weight in unet.named_parameters()}
    session, done = _start(plan, root, unet, ranks)
    if ranks.is_first:
        _announce(plan, sum(shape.numel() for shape in shapes.values()), ranks, done)
    completed = train_steps(session, done, termination)
    session.checkpoints.finish()
    if completed:
        weights = {name: one for name, one in session.average.gather(shapes) if ranks.is_first}
        if ranks.is_first:
            export(plan, root, weights, time.monotonic() - began)
    if session.progress:
        session.progress.close()
    leave_ranks(session.engine)
    if lock is not None:
        os.close(lock)
    if not completed:
        raise SystemExit(TERMINATED)


def checkpoints_of(plan: Plan, root: Root) -> CheckpointFolder:
    """The folder of a run's checkpoints."""
    upstream = {f"{stage} stage": print_ for stage, print_ in plan.upstream.items()}
    return CheckpointFolder(
        path=root.local_path(f"{plan.config.train.folder}/checkpoints"),
        identity=plan.identity,
        settings={**_flat(plan.config.output_fields()), **upstream},
        keep=plan.config.train.keep_checkpoints,
        keep_every=plan.config.train.keep_every,
    )


def _flat(sections: dict[str, dict[str, object]]) -> dict[str, object]:
    """{"model": {"layers": 2}} as {"model.layers": 2}, without what does not bind a checkpoint."""
    flat = {f"{section}.{name}": fields[name] for section, fields in sections.items() for name in fields}
    return {name: value for name, value in flat.items() if name != "train.steps"}


def take_folder(plan: Plan, root: Root) -> int:
    """Make the run's folder this process's own, without what another run left. Returns the lock."""
    folder = root.local_path(plan.config.train.folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder} is being trained by another process. Wait for it or choose another train.name."
        ) from error
    root.delete(f"{plan.config.train.folder}/manifest.json")
    checkpoints = checkpoints_of(plan, root)
    if checkpoints.is_foreign() or checkpoints.is_beyond(plan.config.train.steps):
        for name in (
            "checkpoints",
            "metrics.jsonl",
            "validation.jsonl",
            "previews",
            "tensorboard",
            "wandb",
            "model",
            "recipe.json",
        ):
            root.delete(f"{plan.config.train.folder}/{name}")
    checkpoints.sweep()
    return lock


def _start(plan: Plan, root: Root, unet: torch.nn.Module, ranks: Ranks) -> tuple[Session, int]:
    """Build everything and load the newest checkpoint. Returns the number of steps done too."""
    config = plan.config.train
    engine = make_engine(unet, config, ranks)
    average = Average(owned(engine, MASTER, ranks), config.ema_decay)
    checkpoints = checkpoints_of(plan, root)
    done = checkpoints.load(engine, average, ranks)
    autoencoder = None
    if config.source == "images":
        autoencoder = Autoencoder.load(plan.config.autoencoder, str(ranks.device))
    loader = Loader(plan, root, ranks.rank, ranks.world)
    folder, progress = root.local_path(config.folder), None
    if ranks.is_first:
        progress = Progress(folder, done, config.steps, open_boards(plan, folder, done))
    session = Session(
        config=config,
        ranks=ranks,
        engine=engine,
        average=average,
        objective=Objective(plan.config.diffusion, autoencoder, ranks.device),
        loader=loader,
        checkpoints=checkpoints,
        review=Review(plan, loader, ranks, progress) if config.validation_images else None,
        progress=progress,
        gauge=make_gauge(plan, ranks) if ranks.is_first else None,
    )
    return session, done


def _announce(plan: Plan, parameters: int, ranks: Ranks, done: int) -> None:
    """Say what will be trained."""
    config, images = plan.config.train, sum(plan.samples.rows)
    log.info(
        f"{config.name}  {parameters:,} parameters  {images:,} images with {config.k} neighbors each  "
        f"{config.size} px as {plan.samples.latent_shape}  batch {config.global_batch} on {ranks.world} "
        f"ranks by {config.micro_batch}  {config.precision}  ZeRO {config.zero_stage}  "
        f"steps {done:,} to {config.steps:,} ({config.steps * config.global_batch / images:,.1f} epochs)"
    )
