"""`laion-rdm submit http://head:8265 filter RECIPE ...`: runs a command on a remote Ray cluster.

Uploads the code of this repository; the command runs as a Ray job on the head node. Prints its log and exits with its
exit code. The nodes need the libraries installed, and the recipe's `root` must be reachable from all of them. If the
same command is running there already, its log is followed instead. Ctrl-C stops following the log; the job goes on.
"""

import argparse
import asyncio
import logging
import os
import shlex
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aiohttp import ClientError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.cli.command import exit_on_user_error
from retrieval.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
# ".*" would match the repository itself, whose relative path is ".": Ray would upload an empty package.
EXCLUDED = [".?*", "runs", "docs", "tests", "*.egg-info", "__pycache__"]
FORWARDED_VARIABLES = ("OMP_WAIT_POLICY", "NO_ALBUMENTATIONS_UPDATE")
ACTIVE = (JobStatus.PENDING, JobStatus.RUNNING)
CONNECTION_ERRORS = (RuntimeError, OSError, ClientError)
"""Exceptions of a lost connection to the dashboard."""
PAUSE_S = 3.0
ATTEMPTS = 100
"""Requests to a dashboard that does not respond, PAUSE_S seconds apart, before giving up."""

log = logging.getLogger("submit")


def submit(address: str, command: Sequence[str]) -> int:
    """Run a command as a job and print its log. Returns its exit code. command: module, recipe, arguments.

    Raises UserError if the cluster does not respond, or if the recipe is not in the repository.
    """
    module, recipe, *_ = command
    if not (REPOSITORY / recipe).is_file():
        raise UserError(f"recipe {recipe} does not exist. The project's recipes are in jobs/configs.")
    client = _client(address)
    entrypoint = shlex.join(["python", "-m", *command])
    if name := _active_job(client, entrypoint):
        log.info("%s is running already as %s: following its log", module, name)
    else:
        name = _start(client, entrypoint)
        log.info("submitted as %s", name)
    try:
        return asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        job = f"--address {address} {name}"
        log.warning("the job goes on. Follow it: the same command. Stop it: ray job stop %s", job)
        raise SystemExit(130) from None


def _client(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster responds at {address}: {error} "
            "Give the address of its dashboard: make <stage> CLUSTER=http://<head>:8265"
        ) from error


def runtime_environment() -> dict[str, object]:
    """A job's environment: the code of this repository and a few variables, without data and credentials."""
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    return {"working_dir": str(REPOSITORY), "excludes": EXCLUDED, "env_vars": variables}


def _active_job(client: JobSubmissionClient, entrypoint: str) -> str:
    """The name of a job with this command that has not ended, or ""."""
    jobs = [job for job in client.list_jobs() if job.entrypoint == entrypoint and job.status in ACTIVE]
    return str(jobs[0].submission_id) if jobs else ""


def _start(client: JobSubmissionClient, entrypoint: str) -> str:
    try:
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_environment()))
    except RuntimeError as error:
        raise UserError(f"the cluster did not accept the job: {error}") from error


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
    parser.add_argument("module", help="the command, such as filter or jobs.filter")
    parser.add_argument("recipe", help="a recipe in this repository")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="further arguments of the command")
    arguments = parser.parse_args(argv)

    module = arguments.module if "." in arguments.module else f"jobs.{arguments.module}"

    def work() -> None:
        code = submit(arguments.address, [module, arguments.recipe, *arguments.rest])
        if code:
            raise SystemExit(code)

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
