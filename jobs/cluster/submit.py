"""`python -m jobs.cluster.submit http://head:8265 jobs.filter RECIPE ...`: the same command, on a Ray cluster.

Sends this folder's code to the cluster, where the command runs as a Ray job on the head; shows its log and
ends with its exit code. The nodes have the libraries, and the recipe's `root` is a place that all of them
reach. Where this very command is at work there already, it is followed and not started twice. An interrupt
ends the following alone.
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

FOLDER = Path(__file__).resolve().parents[2]
LEFT_HERE = [".*", "runs", "docs", "tests", "*.egg-info", "__pycache__"]
PASSED_ON = ("OMP_WAIT_POLICY", "NO_ALBUMENTATIONS_UPDATE")
AT_WORK = (JobStatus.PENDING, JobStatus.RUNNING)
CUT = (RuntimeError, OSError, ClientError)
"""What a lost connection to the dashboard raises."""
PAUSE_S = 3.0
ATTEMPTS = 100
"""Questions to a silent dashboard, PAUSE_S seconds apart, before a job is left."""

log = logging.getLogger("submit")


def submit(address: str, command: Sequence[str]) -> int:
    """Run a command of ours as a job and show its log; its exit code. command: module, recipe, arguments.

    Raises UserError where nobody answers at the address, or no longer, or the recipe is not among what is
    sent.
    """
    module, recipe, *_ = command
    if not (FOLDER / recipe).is_file():
        raise UserError(f"recipe {recipe} is not there. Recipes stand in jobs/configs.")
    client = _client(address)
    entry = shlex.join(["python", "-m", *command])
    name = _at_work(client, entry)
    if name:
        log.info("%s is at work already as %s: following it", module, name)
    else:
        name = _start(client, entry)
        log.info("submitted as %s", name)
    try:
        return asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        where = f"--address {address} {name}"
        log.warning("left at work. The same command follows it again; stop it: ray job stop %s", where)
        raise SystemExit(130) from None


def _client(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {error} "
            "Give the address of its dashboard: make <stage> CLUSTER=http://<head>:8265"
        ) from error


def runtime_environment() -> dict[str, object]:
    """What a job gets: this folder's code and the settings of threads; no data and no credentials."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"working_dir": str(FOLDER), "excludes": LEFT_HERE, "env_vars": variables}


def _at_work(client: JobSubmissionClient, entry: str) -> str:
    """The name of a job of this very command that has not ended, or nothing."""
    jobs = [job for job in client.list_jobs() if job.entrypoint == entry and job.status in AT_WORK]
    return str(jobs[0].submission_id) if jobs else ""


def _start(client: JobSubmissionClient, entry: str) -> str:
    try:
        return str(client.submit_job(entrypoint=entry, runtime_env=runtime_environment()))
    except RuntimeError as error:
        raise UserError(f"the cluster takes no job now: {error}") from error


async def _follow(client: JobSubmissionClient, name: str) -> int:
    """Show a job's log until the job ends, over as many connections as that takes; its exit code."""
    shown = 0
    while True:
        place = 0  # each connection gives the log from its beginning
        async for text in _log(client, name):
            print(text[max(0, shown - place) :], end="", flush=True)
            place += len(text)
            shown = max(shown, place)
        details = await _details(client, name)
        if details.status not in AT_WORK:
            return _exit_code(details)
        await asyncio.sleep(PAUSE_S)


async def _log(client: JobSubmissionClient, name: str) -> AsyncIterator[str]:
    """A job's log, to its end or until the connection is cut."""
    try:
        async for text in client.tail_job_logs(name):
            yield text
    except CUT as error:
        where = f"--address {client.get_address()} {name}"
        log.warning("cut off from the log (%s); all of it: ray job logs %s", error, where)


async def _details(client: JobSubmissionClient, name: str) -> JobDetails:
    for _ in range(ATTEMPTS):
        try:
            return client.get_job_info(name)
        except CUT as error:
            log.warning("no word of %s (%s)", name, error)
            await asyncio.sleep(PAUSE_S)
    raise UserError(
        f"the cluster does not answer any longer. {name} may still be at work there: the same command "
        "follows it again."
    )


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    log.error("%s: %s", details.status.value.lower(), details.message)
    return details.driver_exit_code or 1


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jobs.cluster.submit", description=__doc__)
    parser.add_argument("address", help="the cluster's dashboard, such as http://head:8265")
    parser.add_argument("module", help="such as jobs.filter")
    parser.add_argument("recipe", help="a recipe in this repository")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its further arguments")
    given = parser.parse_args(argv)

    def work() -> None:
        code = submit(given.address, [given.module, given.recipe, *given.rest])
        if code:
            raise SystemExit(code)

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
