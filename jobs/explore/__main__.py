"""`laion-rdm explore RECIPE`: a page and an HTTP API to search databases and make pictures.

Binds to localhost by default; other addresses (`--host`) need a token, from the environment variable
EXPLORE_TOKEN or from a file (`--token-file`).
"""

import ipaddress
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from jobs.explore.api import make_api
from jobs.explore.explorer import Explorer
from jobs.explore.page import mount
from jobs.explore.png_cache import PngCache
from jobs.explore.tabs.widgets import PageContext
from jobs.explore.visits import Visits
from retrieval.errors import UserError

TOKEN_VARIABLE = "EXPLORE_TOKEN"
LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
SHUTDOWN_S = 2
"""Seconds that running requests have to finish when the server is interrupted."""


def make_app(explorer: Explorer, host: str = LOOPBACK_HOSTS[0], token: str = "") -> FastAPI:
    # Checking the Host header keeps other sites from reaching a local server by DNS rebinding.
    hosts = LOOPBACK_HOSTS if is_loopback(host) else ["*"]
    cache = PngCache()
    app = make_api(explorer, cache, hosts, token)
    mount(app, PageContext(explorer, cache, Visits()))
    return app


def run(recipe: Recipe, arguments: Namespace) -> None:
    """Serve until interrupted."""
    app = make_app(Explorer.open(recipe), arguments.host, token_of(arguments))
    print(f"open http://{arguments.host}:{arguments.port}{arguments.root_path}/", flush=True)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        root_path=arguments.root_path,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that binds to this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_of(arguments: Namespace) -> str:
    """The token that requests need; empty for none.

    Raises UserError if other machines could connect without a token, and for a token file that is missing or empty.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if arguments.token_file is not None:
        if not arguments.token_file.is_file():
            raise UserError(f"--token-file {arguments.token_file} does not exist. Wanted: a file with the token.")
        token = arguments.token_file.read_text().strip()
        if not token:
            raise UserError(f"--token-file {arguments.token_file} is empty. Write the token into it.")
    if not token and not is_loopback(arguments.host) and not arguments.no_token:
        raise UserError(
            f"--host {arguments.host} lets other machines connect, and no token is set. "
            f"Set {TOKEN_VARIABLE}, give a --token-file, or --no-token to allow everybody."
        )
    return token


def main(argv: Sequence[str] | None = None) -> None:
    options = recipe_parser("explore", __doc__ or "")
    options.add_argument("--host", default=LOOPBACK_HOSTS[0], help="address to bind to (default: %(default)s)")
    options.add_argument("--port", type=int, default=7860, help="port to bind to (default: %(default)s)")
    options.add_argument("--token-file", type=Path, help=f"file with the token (default: {TOKEN_VARIABLE})")
    options.add_argument("--no-token", action="store_true", help="accept requests without a token")
    options.add_argument("--root-path", default="", metavar="/PATH", help="where a proxy serves this page, if not at /")
    arguments = options.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments)))


if __name__ == "__main__":
    main()
