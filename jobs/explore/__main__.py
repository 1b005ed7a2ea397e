"""`python -m jobs.explore RECIPE`: a page and an HTTP API to search databases and make pictures.

Listens on this machine alone unless `--host` says otherwise, and then asks for a token, which stands in the
environment (EXPLORE_TOKEN) or in a file (`--token-file`).
"""

import ipaddress
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from jobs.explore.api import make_api
from jobs.explore.explorer import Explorer
from jobs.explore.page import mount
from jobs.explore.png_cache import Made
from jobs.explore.widgets import Desk
from retrieval.errors import UserError

TOKEN = "EXPLORE_TOKEN"
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]

log = logging.getLogger("explore")


def make_app(explorer: Explorer, host: str = LOOPBACK[0], token: str = "") -> FastAPI:
    """Page and API in one application."""
    # a page elsewhere could otherwise reach a server on loopback through a name of its own
    hosts = LOOPBACK if is_loopback(host) else ["*"]
    made = Made()
    app = make_api(explorer, made, hosts, token)
    mount(app, Desk(explorer, made))
    return app


def run(recipe: Recipe, host: str, port: int, token: str) -> None:
    """Serve until interrupted."""
    app = make_app(Explorer.open(recipe), host, token)
    print(f"open http://{host}:{port}/", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_of(arguments: Namespace) -> str:
    """The token that visitors must know; empty for none.

    Raises UserError where others than this machine could come in without one, and for a file without one.
    """
    token = os.environ.get(TOKEN, "").strip()
    if arguments.token_file is not None:
        if not arguments.token_file.is_file():
            raise UserError(
                f"--token-file {arguments.token_file} is not there. Wanted: a file with the token."
            )
        token = arguments.token_file.read_text().strip()
        if not token:
            raise UserError(f"--token-file {arguments.token_file} is empty. Wanted: a file with the token.")
    if not token and not is_loopback(arguments.host) and not arguments.no_token:
        raise UserError(
            f"--host {arguments.host} lets other machines in, and no token is set. Set {TOKEN}, name a "
            "--token-file, or say --no-token if everybody may."
        )
    return token


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    made = parser("explore", __doc__ or "")
    made.add_argument("--host", default=LOOPBACK[0], help="address to listen on (default: %(default)s)")
    made.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    made.add_argument("--token-file", type=Path, help=f"file with the token; else {TOKEN} in the environment")
    made.add_argument("--no-token", action="store_true", help="let everybody in, wherever this listens")
    arguments = made.parse_args(argv)

    def serve(recipe: Recipe) -> None:
        run(recipe, arguments.host, arguments.port, token_of(arguments))

    finish(lambda: execute(arguments, serve))


if __name__ == "__main__":
    main()
