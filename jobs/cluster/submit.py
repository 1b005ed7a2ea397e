"""`laion-rdm submit http://head:8265 filter RECIPE ...`: runs a command on a remote Ray cluster.

Uploads the code of this repository, the recipe and the list of `optout`; the command runs as a Ray job on the head
node, `train` with `--ray` so that its ranks are workers of the cluster. Prints its log and exits with its exit code.
The nodes need the libraries installed, and the recipe's `root` must be reachable from all of them. If the same command
is running there already, its log is followed instead. Ctrl-C stops following the log; the job goes on.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.cli.command import exit_on_user_error, stage_parser
from jobs.cli.recipe import Recipe, load_recipe
from retrieval.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("retrieval", "pipeline", "trainer", "jobs")
UPLOADED_RECIPE = "recipe.toml"
UPLOADED_LIST = "list.txt"
STAGES = ("filter", "download", "embed", "index", "neighbors", "latents", "train", "sample", "evaluate")
COMMANDS = (*STAGES, "optout", "status")
"""Commands that read and write nothing but the recipe's root, and the list of `optout`."""
FORWARDED_VARIABLES = ("OMP_WAIT_POLICY", "NO_ALBUMENTATIONS_UPDATE")
ACTIVE = (JobStatus.PENDING, JobStatus.RUNNING)
CONNECTION_ERRORS = (RuntimeError, OSError, ClientError)
"""Exceptions of the dashboard's client: no connection, or a response that is an error."""
PAUSE_S = 3.0
ATTEMPTS = 100
"""Requests to a dashboard that does not respond, PAUSE_S seconds apart, before giving up."""

log = logging.getLogger("submit")


class Command(NamedTuple):
    """A command of this project, as it is submitted."""

    name: str
    recipe: Recipe
    arguments: tuple[str, ...]
    list_file: Path | None = None
    """The list of `optout`, unless that is a URL."""

    @property
    def files(self) -> dict[str, Path]:
        """The files that are uploaded besides the code, by their names there."""
        return {UPLOADED_RECIPE: self.recipe.path} | ({UPLOADED_LIST: self.list_file} if self.list_file else {})

    @property
    def entrypoint(self) -> str:
        """The shell command of the job."""
        return shlex.join(["python", "-m", f"jobs.{self.name}", UPLOADED_RECIPE, *self.arguments])

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe with all its values and of the list: it distinguishes jobs with the same entrypoint."""
        content = self.list_file.read_bytes() if self.list_file else b""
        return hashlib.sha256(json.dumps(self.recipe.resolved(), sort_keys=True).encode() + content).hexdigest()


def submit(address: str, command: Command) -> int:
    """Run a command as a job and print its log. Returns its exit code.

    Raises UserError if the cluster does not respond, or if the same command runs there with another recipe.
    """
    try:
        client = JobSubmissionClient(address)
        name = _active_job(client, command)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} denies access (401). Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "cluster's token."
        ) from error
    except CONNECTION_ERRORS as error:
        raise UserError(
            f"no Ray cluster responds at {address}: {error} "
            "Give the address of its dashboard: make <stage> CLUSTER=http://<head>:8265"
        ) from error
    if name:
        log.info("%s is running already as %s: following its log", command.name, name)
    else:
        name = start_job(client, command)
        log.info("submitted as %s", name)
    try:
        return asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        job = f"--address {address} {name}"
        log.warning("the job goes on. Follow it: the same command. Stop it: ray job stop %s", job)
        raise SystemExit(130) from None


def read_command(name: str, recipe: Path, arguments: Sequence[str]) -> Command:
    """A command for `submit`. Raises UserError if it would read or write files that only this machine has."""
    name = name.removeprefix("jobs.")
    if name not in COMMANDS:
        raise UserError(f"{name} cannot be submitted to a cluster. Wanted one of: {', '.join(COMMANDS)}.")
    parser = stage_parser(name, None)
    if name == "train":  # without --ray it would train on the head alone
        arguments = ["--ray", *(word for word in arguments if word != "--ray")]
        parser.add_argument("--ray", action="store_true")
    if name == "status":
        parser.add_argument("--watch")
    list_file = None
    if name == "optout":
        list_file, arguments = _read_list_option(arguments)
    known, others = parser.parse_known_args([str(recipe), *arguments])
    if name in ("sample", "train") and others:
        raise UserError(
            f"{name} {' '.join(others)}: on a cluster this command takes --set and --remake only, because other "
            "options name files of this machine. Run it here: the recipe's root may be on the cluster's object store."
        )
    if name == "status" and known.watch:
        raise UserError("status --watch would not end on the cluster, not even after Ctrl-C. Leave --watch out.")
    loaded = load_recipe(recipe, known.overrides)
    if "://" not in loaded.root.url and not Path(loaded.root.url).is_absolute():
        raise UserError(
            f"{recipe}: root = {loaded.root.url!r} is relative. On the cluster that is a temporary folder, and the "
            "outputs would be lost. Wanted: a URL such as s3://bucket/run, or the absolute path of a folder that all "
            f"nodes share. Add --set root=... To run it on this machine: make {name} CLUSTER= RAY_ADDRESS="
        )
    return Command(name, loaded, tuple(arguments), list_file)


def _read_list_option(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of --list, None if it is a URL, and the arguments with the name that it has on the cluster."""
    parser = argparse.ArgumentParser(prog="laion-rdm optout", add_help=False)
    parser.add_argument("--list", required=True, dest="path")
    known, others = parser.parse_known_args(arguments)
    if "://" in known.path:
        return None, ["--list", known.path, *others]
    if not Path(known.path).is_file():
        raise UserError(f"--list {known.path!r} is no file of this machine. Wanted: such a file, or a URL.")
    return Path(known.path), ["--list", UPLOADED_LIST, *others]


def copy_upload(files: Mapping[str, Path], folder: Path) -> None:
    """Copy what a job needs into an empty folder: the code, without data and credentials, and files by their names."""
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _active_job(client: JobSubmissionClient, command: Command) -> str:
    """The name of a job with this command that has not ended, or ""."""
    jobs = [job for job in client.list_jobs() if job.entrypoint == command.entrypoint and job.status in ACTIVE]
    for job in jobs:
        if (job.metadata or {}).get("recipe") == command.digest:
            return str(job.submission_id)
    if jobs:
        raise UserError(
            f"{command.name} is running already as {jobs[0].submission_id}, with another recipe or list, or other "
            f"contents of {command.recipe.path}. Wait for it, or stop it: "
            f"ray job stop --address {client.get_address()} {jobs[0].submission_id}"
        )
    return ""


def start_job(client: JobSubmissionClient, command: Command) -> str:
    """Start a job and return its name. Raises UserError if the cluster does not accept it."""
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    with TemporaryDirectory(prefix="laion-rdm-upload-") as folder:
        copy_upload(command.files, Path(folder))
        try:
            name = client.submit_job(
                entrypoint=command.entrypoint,
                runtime_env={"working_dir": folder, "env_vars": variables},
                metadata={"recipe": command.digest},
            )
        except CONNECTION_ERRORS as error:
            raise UserError(f"the cluster did not accept the job: {error}") from error
    return str(name)


async def _follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's log until the job ends, reconnecting if necessary. Returns its exit code."""
    num_printed = 0
    while True:
        position = 0  # every connection sends the log from its beginning
        async for text in _log(client, name):
            print(text[max(0, num_printed - position) :], end="", flush=True)
            position += len(text)
            num_printed = max(num_printed, position)
        details = await _details(client, name)
        if details.status not in ACTIVE:
            return _exit_code(details)
        await asyncio.sleep(PAUSE_S)


async def _log(client: JobSubmissionClient, name: str) -> AsyncIterator[str]:
    """A job's log, until its end or until the connection is lost."""
    try:
        async for text in client.tail_job_logs(name):
            yield text
    except CONNECTION_ERRORS as error:
        job = f"--address {client.get_address()} {name}"
        log.warning("connection to the log lost (%s). Complete log: ray job logs %s", error, job)


async def _details(client: JobSubmissionClient, name: str) -> JobDetails:
    for _ in range(ATTEMPTS):
        try:
            return client.get_job_info(name)
        except CONNECTION_ERRORS as error:
            log.warning("no status of %s (%s)", name, error)
            await asyncio.sleep(PAUSE_S)
    raise UserError(
        f"the cluster does not respond any more. {name} may still be running: start the same command again "
        "to follow it."
    )


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    log.error("%s: %s", details.status.value.lower(), details.message)
    return details.driver_exit_code or 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="laion-rdm submit", description=__doc__)
    parser.add_argument("address", help="address of the cluster's dashboard, such as http://head:8265")
    parser.add_argument("command", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("recipe", type=Path, help="TOML file, such as those in jobs/configs")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="further arguments of the command")
    arguments = parser.parse_args(argv)

    def work() -> None:
        command = read_command(arguments.command, arguments.recipe, arguments.rest)
        code = submit(arguments.address, command)
        if code:
            raise SystemExit(code)

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
