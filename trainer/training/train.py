"""Training on one rank, from the recipe to the exported weights.

Reads neighbors and latents (or images) through `trainer.data.loader`; writes checkpoints, metrics and, at the
end, the model and the manifest below `runs/<name>/train/` of the root, which may be an object store. Rank 0 holds the
lease of this folder. The same command resumes a run, on any machine that reaches the root. Every random number is a
function of the seed and the step. On CPUs, and on GPUs with `train.deterministic`, a resumed run equals an
uninterrupted one to the bit on the same number of ranks. On another number the sums of gradients round differently:
after 20 steps of a small network, losses differed by 1e-7 in fp32 and by 3e-4 in bf16.
"""

import logging
import time
from contextlib import ExitStack
from functools import partial

import torch

from retrieval.extras import import_wandb
from retrieval.storage.lease import lease, raise_if_lost
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.export import ADAPTER, export_run, read_model_weights
from trainer.checkpoint.snapshots import SNAPSHOTS, Snapshots, snapshot_folder
from trainer.data.batch_order import bucket_rows
from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan, is_finished, make_plan
from trainer.engine.deepspeed_engine import (
    Ranks,
    check_ranks,
    gather_numbers,
    join_ranks,
    leave_ranks,
    make_engine,
    raised_on_all,
    use_deterministic_algorithms,
)
from trainer.engine.ema import MovingAverage
from trainer.engine.fragments import MASTER, owned_fragments, set_masters
from trainer.engine.power_ema import PowerAverage
from trainer.model.autoencoder import Autoencoder
from trainer.model.lora import add_adapters
from trainer.model.unet import build_unet, use_unfused_attention
from trainer.recipe import TrainingRecipe
from trainer.tracking.dashboards import open_dashboards
from trainer.tracking.flops import make_utilization_meter
from trainer.tracking.profiling import PROFILES, StepProfiler
from trainer.tracking.training_log import KID, METRICS, PREVIEWS, VALIDATION, TrainingLog, read_step_metrics, summarize
from trainer.training.disk import check_shared, check_space, lease_number
from trainer.training.launch import TERMINATED, die_with_parent
from trainer.training.loop import Session, Termination, train_steps
from trainer.training.monitoring import ModelMonitor
from trainer.training.objective import Objective
from trainer.training.run_files import RunFiles

log = logging.getLogger("train")

OUTPUTS = (
    "checkpoints",
    SNAPSHOTS,
    METRICS,
    VALIDATION,
    KID,
    PREVIEWS,
    PROFILES,
    "tensorboard",
    "wandb",
    "model",
    ADAPTER,
    "recipe.json",
)
"""Files and folders of a run that `train.restart` deletes, besides the manifest."""


def prepare(config: TrainingRecipe, root: Root) -> TrainingPlan:
    """Plan a run and make all checks that need no process group. Raises UserError."""
    if config.train.wandb:
        import_wandb()
    plan = make_plan(config, root, Autoencoder.load(config.autoencoder, "cpu"))
    if not config.train.restart:
        checkpoints_of(plan, root).check(config.train.steps)
    if not is_finished(plan, root):
        check_space(plan, root)
    return plan


def run(config: TrainingRecipe, root: Root) -> None:
    """Train as one of the ranks; all ranks call it. Exits with code 143 after SIGTERM and a checkpoint.

    An error of one rank at the start or in the export is raised on all ranks.
    """
    die_with_parent()
    if config.train.deterministic:
        use_deterministic_algorithms()
    ranks = join_ranks(config.train.timeout_minutes)
    with raised_on_all(ranks):
        check_ranks(config.train, ranks.world)
        plan = prepare(config, root)
        finished = is_finished(plan, root)
    # Rank 0 decides: another rank may not see the root of rank 0, which `check_shared` finds.
    if gather_numbers(torch.tensor([finished], device=ranks.device), ranks)[0]:
        log.info(f"{root.at(config.train.folder)} is finished")
        leave_ranks()
        return
    termination = Termination()
    with ExitStack() as resources:
        number = 0
        with raised_on_all(ranks):
            if ranks.is_first:
                resources.enter_context(lease(root, config.train.folder))
                clear_folder(plan, root)
                bucket_rows(plan, root)  # the other ranks read its file
                number = lease_number(root, config.train.folder)
        with raised_on_all(ranks):
            check_shared(root, config.train.folder, number, ranks)
        completed = _train(plan, root, ranks, termination, resources)
    if not completed:
        raise SystemExit(TERMINATED)


def _train(plan: TrainingPlan, root: Root, ranks: Ranks, termination: Termination, resources: ExitStack) -> bool:
    """Train, and export the model. Returns False if SIGTERM ended the training."""
    config, began = plan.config, time.monotonic()
    with raised_on_all(ranks):
        unet = _initial_network(config, root, ranks.device)
        files = RunFiles(root, config.train.folder, resources) if ranks.is_first else None
    shapes = {name: weight.shape for name, weight in unet.named_parameters() if weight.requires_grad}
    session, progress = _start(plan, root, unet, ranks, files)
    if ranks.is_first:
        _log_start(plan, sum(shape.numel() for shape in shapes.values()), ranks, progress)
        if changes := session.checkpoints.changes():
            log.info(f"settings changed since the last checkpoint: {changes}")
    session.connect()
    completed = train_steps(session, progress, termination)
    session.checkpoints.finish()
    # All ranks must iterate over the averages; only rank 0 keeps them.
    gathered = session.average.gather(shapes) if completed else ()
    weights = {name: weight for name, weight in gathered if ranks.is_first}
    with raised_on_all(ranks):
        if session.training_log and files:
            session.training_log.close()
            raise_if_lost()
            files.send()
            if completed:
                numbers = summarize(read_step_metrics(files.path / METRICS))
                export_run(plan, root, weights, numbers, time.monotonic() - began)
    leave_ranks(session.engine)
    return completed


def _initial_network(config: TrainingRecipe, root: Root, device: torch.device) -> torch.nn.Module:
    """The network with seeded weights or those of `train.start_from`, and with adapters if the recipe has them.

    device: on which it will train.
    """
    torch.manual_seed(config.train.seed)
    unet = build_unet(config.model)
    if config.train.start_from:
        unet.load_state_dict(read_model_weights(root, f"runs/{config.train.start_from}/train"), strict=True)
    if config.train.lora:
        add_adapters(unet, config.train.lora)
    if device.type == "cpu":
        use_unfused_attention(unet)
    return unet


def checkpoints_of(plan: TrainingPlan, root: Root) -> CheckpointFolder:
    """The folder of a run's checkpoints."""
    upstream = {f"{stage} stage": fingerprint for stage, fingerprint in plan.upstream.items()}
    return CheckpointFolder(
        root=root.child(f"{plan.config.train.folder}/checkpoints"),
        identity=plan.checkpoint_identity,
        settings={**_flat(plan.config.output_fields()), **upstream},
        keep=plan.config.train.keep_checkpoints,
        keep_every=plan.config.train.keep_every,
        timeout_minutes=plan.config.train.timeout_minutes,
        encoder=plan.encoder,
    )


def _flat(sections: dict[str, dict[str, object]]) -> dict[str, object]:
    """{"model": {"layers": 2}} as {"model.layers": 2}, without train.steps, which may change on resuming."""
    flat = {f"{section}.{name}": fields[name] for section, fields in sections.items() for name in fields}
    return {name: value for name, value in flat.items() if name != "train.steps"}


def clear_folder(plan: TrainingPlan, root: Root) -> None:
    """Delete the manifest, files of another run and unfinished checkpoints. Only for the holder of the lease."""
    root.delete(f"{plan.config.train.folder}/manifest.json")
    root.delete_partial_files(plan.config.train.folder)  # of a killed export too
    checkpoints = checkpoints_of(plan, root)
    if checkpoints.is_unusable(plan.config.train.steps):
        for name in OUTPUTS:
            root.delete(f"{plan.config.train.folder}/{name}")
    checkpoints.delete_unfinished()
    snapshot_folder(plan, root).delete_after(checkpoints.newest_step())


def _start(
    plan: TrainingPlan, root: Root, unet: torch.nn.Module, ranks: Ranks, files: RunFiles | None
) -> tuple[Session, Progress]:
    """Build the session and load the newest checkpoint. Also returns what the run has done. files: on rank 0."""
    config = plan.config.train
    weights = {name: weight.detach() for name, weight in unet.named_parameters() if weight.requires_grad}
    engine = make_engine(unet, config, ranks)
    if config.precision == "bf16":
        set_masters(engine, weights, ranks)
    masters = owned_fragments(engine, MASTER, ranks)
    average = MovingAverage(masters, config.ema_decay)
    power_averages = [PowerAverage(masters, width) for width in config.ema_widths]
    checkpoints = checkpoints_of(plan, root)
    progress = checkpoints.load(engine, [average, *power_averages], ranks)
    done = progress.step
    with raised_on_all(ranks):  # no collective within: CLIP, dashboards or shards may fail on one rank
        autoencoder = None
        if config.source == "images":
            autoencoder = Autoencoder.load(plan.config.autoencoder, str(ranks.device))
        loader = Loader(plan, root, ranks.rank, ranks.world, progress.images - done * config.global_batch)
        training_log = profiler = None
        if files:
            training_log = TrainingLog(files.path, done, config.steps, open_dashboards(plan, files.path, done))
            profiler = StepProfiler(files.path, done, config.profile_steps) if config.profile_steps else None
            checkpoints.before_publishing = partial(_before_publishing, files)
        session = Session(
            config=config,
            ranks=ranks,
            engine=engine,
            average=average,
            objective=Objective(plan.config.diffusion, autoencoder, ranks.device, config.min_snr_gamma),
            loader=loader,
            checkpoints=checkpoints,
            snapshots=Snapshots(snapshot_folder(plan, root), power_averages, config.ema_snapshot_every),
            monitor=ModelMonitor(plan, loader, ranks, training_log, autoencoder) if config.validation_images else None,
            training_log=training_log,
            utilization=make_utilization_meter(plan, ranks) if ranks.is_first else None,
            profiler=profiler,
        )
    return session, progress


def _before_publishing(files: RunFiles) -> None:
    """Raise UserError if another process has taken over the run; send its metrics up to the checkpoint and later."""
    raise_if_lost()
    files.send()


def _log_start(plan: TrainingPlan, parameters: int, ranks: Ranks, done: Progress) -> None:
    """Log a summary of the run."""
    config, images = plan.config.train, sum(plan.training_set.rows)
    count = len(plan.training_set.shapes)
    shapes = f" in {count} aspect ratios" if count > 1 else ""
    epochs = (done.images + (config.steps - done.step) * config.global_batch) / images
    log.info(
        f"{config.name}  {parameters:,} trained parameters  {images:,} images with {config.k} neighbors each  "
        f"{config.size} px as {plan.training_set.latent_shape}{shapes}  batch {config.global_batch} on {ranks.world} "
        f"ranks by {config.micro_batch}  {config.precision}  ZeRO {config.zero_stage}  "
        f"steps {done.step:,} to {config.steps:,} ({epochs:,.1f} epochs)"
    )
