"""`python -m jobs.submit http://head:8265 jobs.filter RECIPE ...`: the same command, on a Ray cluster.

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
from collections.abc import Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.command import finish
from retrieval.errors import UserError

FOLDER = Path(__file__).resolve().parents[1]
LEFT_HERE = [".*", "runs", "docs", "tests", "*.egg-info", "__pycache__"]
PASSED_ON = ("OMP_WAIT_POLICY", "NO_ALBUMENTATIONS_UPDATE")
AT_WORK = (JobStatus.PENDING, JobStatus.RUNNING)

log = logging.getLogger("submit")


def submit(address: str, command: Sequence[str]) -> int:
    """Run a command of ours as a job and show its log; its exit code. command: module, recipe, arguments.

    Raises UserError where nobody answers at the address, or the recipe is not among what is sent.
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
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        where = f"--address {address} {name}"
        log.warning("left at work. The same command follows it again; stop it: ray job stop %s", where)
        raise SystemExit(130) from None
    return _exit_code(client, name)


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


async def _follow(client: JobSubmissionClient, name: str) -> None:
    async for text in client.tail_job_logs(name):
        print(text, end="", flush=True)


def _exit_code(client: JobSubmissionClient, name: str) -> int:
    details = client.get_job_info(name)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    log.error("%s: %s", details.status.value.lower(), details.message)
    return details.driver_exit_code or 1


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jobs.submit", description=__doc__)
    parser.add_argument("address", help="the cluster's dashboard, such as http://head:8265")
    parser.add_argument("module", help="such as jobs.filter")
    parser.add_argument("recipe", help="a recipe in this repository")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its further arguments")
    given = parser.parse_args(argv)

    def work() -> None:
        code = submit(given.address, [given.module, given.recipe, *given.rest])
        if code:
            raise SystemExit(code)

    finish(work)


if __name__ == "__main__":
    main()
