"""`make bench-load`: a crowd searches the explore page's API for a minute; does anybody meet an error?

Starts `python -m jobs.explore RECIPE` on a free port; 100 visitors each ask again as soon as they are
answered, for texts of their own, one database after the other. Writes `docs/load.json` and `docs/load.md`.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.common.page import DOCS, write
from jobs.cli.command import exit_on_user_error
from jobs.cli.recipe import Recipe, load_recipe
from jobs.reporting.hardware import hardware
from retrieval.errors import UserError
from trainer.sampling.recipe import SampleConfig

START_S = 300.0
K = 20

PAGE = """# A crowd at the page

Written by `make bench-load`; the numbers are in `load.json`.

**Machine:** {hardware}; the crowd runs on it too.

**Method:** {visitors} visitors search `{recipe}` ({rows:,} rows in {databases} databases) by text for
{seconds:g} s, k = {k}, each asking again as soon as it is answered.

{answered:,} searches, {per_s:.0f} a second; {errors} errors. Half were answered within **{p50_ms:.0f} ms**,
99 of 100 within **{p99_ms:.0f} ms**, the slowest within {max_ms:.0f} ms. `/health`, asked ten times a second
meanwhile, was answered within {health_p99_ms:.0f} ms (99 of 100).
"""


@contextmanager
def server(recipe: Path) -> Iterator[str]:
    """The address of a running server; it is stopped when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "jobs.explore", str(recipe), "--port", str(port)])
    try:
        address, began = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(address):
            if process.poll() is not None or time.monotonic() - began > START_S:
                raise UserError(f"python -m jobs.explore {recipe} did not start within {START_S:g} s")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


async def crowd(address: str, texts: list[str], visitors: int, seconds: float) -> dict[str, Any]:
    """What so many visitors met: latencies in ms and statuses."""
    limits = httpx.Limits(max_connections=visitors + 1)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        about = (await client.get("/databases")).json()["databases"]
        names = [one["name"] for one in about]
        until = time.monotonic() + seconds
        times: list[float] = []
        health: list[float] = []
        statuses: Counter[str] = Counter()

        async def ask(path: str, params: dict[str, Any], spent: list[float]) -> None:
            began = time.monotonic()
            try:
                statuses[str((await client.get(path, params=params)).status_code)] += 1
            except httpx.TransportError as error:
                statuses[type(error).__name__] += 1
            spent.append(1000 * (time.monotonic() - began))

        async def visit(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                text = f"{texts[turn % len(texts)]}, {number} {turn}"
                await ask("/search", {"text": text, "database": names[turn % len(names)], "k": K}, times)
                turn += 1

        async def watch() -> None:
            while time.monotonic() < until:
                await ask("/health", {}, health)
                await asyncio.sleep(0.1)

        await asyncio.gather(watch(), *(visit(number) for number in range(visitors)))
    return {
        "databases": len(names),
        "rows": sum(one["rows"] for one in about),
        "answered": len(times),
        "per_s": len(times) / seconds,
        "errors": sum(count for status, count in statuses.items() if status != "200"),
        "statuses": dict(statuses),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "max_ms": max(times),
        "health_p99_ms": float(np.percentile(health, 99)),
    }


def texts_of(recipe: Recipe) -> list[str]:
    """What the visitors look for."""
    prompts = recipe[SampleConfig].all_prompts() if recipe.has("sample") else ()
    return list(prompts) or ["a red boat", "two trees by the sea", "a woman with a hat"]


def run(arguments: argparse.Namespace) -> None:
    """Measure and write the page. Ends with code 1 if anybody met an error."""
    texts = texts_of(load_recipe(arguments.recipe))
    with server(arguments.recipe) as address:
        asyncio.run(crowd(address, texts, 4, 2.0))  # whatever is opened at the first call
        met = asyncio.run(crowd(address, texts, arguments.visitors, arguments.seconds))
    facts = {"visitors": arguments.visitors, "seconds": arguments.seconds, "recipe": arguments.recipe.name}
    result = {"hardware": hardware(), **facts, "k": K, **met}
    write(arguments.out, "load", result, PAGE.format(**result))
    if result["errors"]:
        raise SystemExit(1)


def main() -> None:
    """Parse arguments and measure."""
    made = argparse.ArgumentParser(prog="make bench-load", description=__doc__)
    made.add_argument("recipe", type=Path, metavar="RECIPE")
    made.add_argument("--seconds", type=float, default=60.0, help="(default %(default)s)")
    made.add_argument("--visitors", type=int, default=100, help="(default %(default)s)")
    made.add_argument("--out", type=Path, default=DOCS, help="folder of the page (default docs)")
    exit_on_user_error(lambda: run(made.parse_args()))


if __name__ == "__main__":
    main()
