"""`make bench-load`: load test of the explore page's API with 100 concurrent visitors for a minute.

Starts `python -m jobs.explore RECIPE` on a free port. Each visitor sends the next search as soon as the last one is
answered, with a different text each time, one database after the other. Writes `docs/load.json` and `docs/load.md`.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import httpx
import numpy as np

from benchmarks.common.on_recipe import recipe_benchmark_parser, report_on_recipe
from benchmarks.common.processes import free_port
from jobs.cli.recipe import Recipe
from jobs.reporting.hardware import hardware
from retrieval.errors import UserError
from trainer.sampling.recipe import SampleConfig

START_S = 300.0
K = 20

PAGE = """# Load test of the explore page

Written by `make bench-load`; the numbers are in `load.json`.

**Machine:** {hardware}; the visitors run on the same machine.

**Method:** {visitors} visitors search `{recipe}` ({rows:,} rows in {databases} databases) by text for
{seconds:g} s, k = {k}. Each visitor sends the next search as soon as the last one is answered.

{answered:,} searches, {per_s:.0f} a second; {errors} errors. Latency: median **{p50_ms:.0f} ms**,
99th percentile **{p99_ms:.0f} ms**, maximum {max_ms:.0f} ms. `/health`, requested ten times a
second by another process during the test, had a 99th percentile of {health_p99_ms:.0f} ms.
"""


@contextmanager
def server(recipe: Recipe) -> Iterator[str]:
    """Start a server and yield its URL; the server is stopped when the block ends."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "jobs.explore", *recipe.arguments(), "--port", str(port)])
    try:
        address, start = f"http://127.0.0.1:{port}", time.monotonic()
        while not _is_healthy(address):
            if process.poll() is not None or time.monotonic() - start > START_S:
                raise UserError(
                    f"python -m jobs.explore {recipe.path} did not start in {START_S:g} s. See its messages."
                )
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


@dataclass
class Requests:
    """Latencies in ms and statuses of requests."""

    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    async def send(self, client: httpx.AsyncClient, path: str, params: dict[str, Any]) -> None:
        """Send a request and wait for its answer."""
        start = time.monotonic()
        try:
            self.statuses[str((await client.get(path, params=params)).status_code)] += 1
        except httpx.TransportError as error:
            self.statuses[type(error).__name__] += 1
        self.latencies_ms.append(1000 * (time.monotonic() - start))


def connect(address: str) -> httpx.AsyncClient:
    """A client for one visitor. A client for all of them would look through all connections at each request.

    The server has no TLS; without `verify` a client starts sooner.
    """
    return httpx.AsyncClient(base_url=address, timeout=60, verify=False)


def check_health(address: str, seconds: float) -> Requests:
    """Request `/health` ten times a second."""

    async def check() -> Requests:
        checks, end = Requests(), time.monotonic() + seconds
        async with connect(address) as client:
            while time.monotonic() < end:
                await checks.send(client, "/health", {})
                await asyncio.sleep(0.1)
        return checks

    return asyncio.run(check())


async def measure(address: str, texts: list[str], visitors: int, seconds: float) -> dict[str, Any]:
    """Latencies in ms and statuses of concurrent visitors."""
    databases = httpx.get(f"{address}/databases", timeout=60).json()["databases"]
    names = [database["name"] for database in databases]
    searches = Requests()
    end = time.monotonic() + seconds

    async def visit(number: int) -> None:
        async with connect(address) as client:
            count = number
            while time.monotonic() < end:
                text = f"{texts[count % len(texts)]}, {number} {count}"
                database = names[count % len(names)]
                await searches.send(client, "/search", {"text": text, "database": database, "k": K})
                count += 1

    # A process of its own: the visitors' event loop is as busy as the server's.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        health = asyncio.get_running_loop().run_in_executor(pool, check_health, address, seconds)
        checks, *_ = await asyncio.gather(health, *(visit(number) for number in range(visitors)))
    statuses = searches.statuses + checks.statuses
    return {
        "databases": len(names),
        "rows": sum(database["rows"] for database in databases),
        "answered": len(searches.latencies_ms),
        "per_s": len(searches.latencies_ms) / seconds,
        "errors": sum(count for status, count in statuses.items() if status != "200"),
        "statuses": dict(statuses),
        "p50_ms": float(np.percentile(searches.latencies_ms, 50)),
        "p99_ms": float(np.percentile(searches.latencies_ms, 99)),
        "max_ms": max(searches.latencies_ms),
        "health_p99_ms": float(np.percentile(checks.latencies_ms, 99)),
    }


def texts_of(recipe: Recipe) -> list[str]:
    """The query texts of the visitors."""
    prompts = recipe[SampleConfig].all_prompts() if recipe.has("sample") else ()
    return list(prompts) or ["a red boat", "two trees by the sea", "a woman with a hat"]


def measure_page(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Start the page and measure it as the arguments say."""
    texts = texts_of(recipe)
    with server(recipe) as address:
        asyncio.run(measure(address, texts, 4, 2.0))  # warm up: the first calls open files
        measured = asyncio.run(measure(address, texts, options.visitors, options.seconds))
    settings = {"visitors": options.visitors, "seconds": options.seconds, "recipe": recipe.path.name}
    return {"hardware": hardware(), **settings, "k": K, **measured}


def page(result: dict[str, Any]) -> str:
    return PAGE.format(**result)


def main() -> None:
    """Measure and write the page. Exits with code 1 if any request failed."""
    parser = recipe_benchmark_parser("page.load", __doc__, "recipe whose databases are searched")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration (default %(default)s)")
    parser.add_argument("--visitors", type=int, default=100, help="concurrent visitors (default %(default)s)")
    if report_on_recipe(parser, "load", measure_page, page)["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
