"""The console command `laion-rdm COMMAND ...`: all commands of the project under one name.

A command's module is imported when the command runs, so `--help` and mistakes answer at once. `python -m
jobs.<command>` and `python -m retrieval <command>` do the same.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

PACKAGES = ("retrieval", "pipeline", "trainer", "jobs")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # Ray writes a token to the home folder otherwise
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads take the cores of other processes otherwise
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "DS_ACCELERATOR": "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu",
}
"""Defaults of environment variables, as in the Makefile."""


@dataclass(frozen=True)
class Command:
    """A command. module: has `main(argv)`; extra: what it needs besides the core."""

    module: str
    extra: str
    about: str


DATABASE_COMMANDS = {
    "search": "search a database by text, picture or vector",
    "info": "print size, encoder and measured recall of a database",
    "verify": "check a database's files and recall, or the signature of a picture",
    "build": "build a database from vectors of another tool",
    "add": "add vectors to a database",
    "delete": "delete images from all files of a database",
    "merge": "merge databases of one encoder",
    "hide": "hide images of a database from every search",
    "calibrate": "measure search settings for your own queries",
    "card": "print a database's README",
}
"""Commands of `python -m retrieval`: their names are its first argument."""

GROUPS: dict[str, dict[str, Command]] = {
    "search a database": {
        name: Command("retrieval.cli.commands", "", about) for name, about in DATABASE_COMMANDS.items()
    },
    "stages of a recipe, in order": {
        "filter": Command("jobs.filter", "pipeline", "select images from metadata"),
        "download": Command("jobs.download", "pipeline", "download them into WebDataset shards"),
        "embed": Command("jobs.embed", "pipeline", "compute CLIP vectors"),
        "index": Command("jobs.index", "pipeline", "build the search index"),
        "neighbors": Command("jobs.neighbors", "pipeline", "find the neighbors of every training image"),
        "latents": Command("jobs.latents", "pipeline,train", "encode training images with the autoencoder"),
        "train": Command("jobs.train", "train", "train the diffusion model"),
        "sample": Command("jobs.sample", "train", "make pictures of prompts"),
        "evaluate": Command("jobs.evaluate", "train", "measure how well databases change the style"),
    },
    "work with a recipe": {
        "demo": Command("jobs.demo.run", "all", "run all stages on a small synthetic data set"),
        "database": Command("jobs.database", "pipeline", "build style databases from pictures"),
        "import": Command("jobs.imports.__main__", "pipeline", "take your own pictures"),
        "finetune": Command("jobs.finetune.__main__", "pipeline,train", "train a finished model on your own pictures"),
        "convert": Command("jobs.convert", "train", "import or export a model of another project"),
        "optout": Command("jobs.optout", "pipeline", "remove listed images from databases and training"),
        "view": Command("jobs.view.__main__", "pipeline", "write a page with pictures, refused rows and neighbors"),
        "status": Command("jobs.status.__main__", "", "show how far each stage is"),
        "capacity": Command("jobs.capacity.__main__", "train", "estimate storage, hours and cost"),
        "paper": Command("jobs.paper.__main__", "train", "reproduce the paper's figures and tables"),
        "explore": Command("jobs.explore.__main__", "page", "serve a web page and an HTTP API"),
        "submit": Command("jobs.cluster.submit", "pipeline", "run a stage on a remote Ray cluster"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def usage() -> str:
    """The text of `--help`."""
    lines = ["usage: laion-rdm COMMAND ...", "       laion-rdm COMMAND --help"]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10} {command.about}" for name, command in group.items())]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, with the other arguments."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from retrieval.errors import UserError  # not at the top: --help does not need it

    try:
        run(name, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(name: str, arguments: list[str]) -> None:
    """Run one command. Raises UserError for an unknown one, and where its packages are not installed."""
    from retrieval.errors import UserError

    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else "laion-rdm --help lists all commands."
        raise UserError(f"laion-rdm has no command {name!r}. {hint}")
    command = COMMANDS[name]
    try:
        main = import_module(command.module).main
        code = main([name, *arguments] if name in DATABASE_COMMANDS else arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in PACKAGES or not command.extra:
            raise
        raise UserError(
            f"laion-rdm {name} needs the package {package}, which is not installed: "
            f"pip install 'laion-rdm[{command.extra}]'"
        ) from error
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
