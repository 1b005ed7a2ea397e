"""The exceptions for what the user can correct, and the advice for a damaged manifest or JSON file.

Any other exception is a defect and keeps its traceback.
"""

import shlex

COMMANDS = {"": "database", "databases": "database", "neighbors_effort": "neighbors", "frequency": "sample"}
"""Targets of make that are not named as the folder of their output."""
OTHER_COMMANDS = {"": "laion-rdm build", "download": "make import"}
"""Commands that write the same output from another source."""

STAGES = ("filter", "download", "embed", "index", "neighbors", "latents", "train", "sample", "evaluate", "paper")
COMMAND_OF_FOLDER = {
    **{stage: f"'make {stage}'" for stage in STAGES},
    "download": "'make download' (or 'make import', if that wrote it)",
    "databases": "'make database'",
    "neighbors_effort": "'make neighbors'",
    "near_copies": "'make embed'",
    "buckets": "'make train'",
    "optout": "'make optout'",
}
"""Commands that write the files of a folder, by its name."""


class UserError(Exception):
    """A mistake in a recipe, folder or file. Says where, what was found, what was expected and what to do.

    Commands print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2


class NodeError(UserError):
    """A fault of one machine or its connections: network, object store, disk. Elsewhere or later it may not occur."""


class UnfinishedError(UserError):
    """Some shards of a stage failed. The others are finished and kept; the next start tries the failed ones again."""

    exit_code = 3


class RecallWarning(UserWarning):
    """The recall of a search was not measured, or is reached only at a high cost. Says why and what to do."""


def command_of(stage: str) -> str:
    """The target of make that writes the output of a stage or, for "", of a database."""
    parts = stage.split("/")
    return parts[-1] if parts[0] == "runs" else COMMANDS.get(parts[0], parts[0])


def damage_advice(root: str, stage: str) -> str:
    """The advice for a damaged manifest. Its folder may have pictures, checkpoints and lists of hidden images."""
    name = "/".join(part for part in (root, stage, "manifest.json") if part)
    other = f" (or '{OTHER_COMMANDS[stage]}', if that wrote it)" if stage in OTHER_COMMANDS else ""
    return (
        f"Restore the file from a copy. Without a copy, move {name} out of its folder, keep the other files there,"
        f" and run 'make {command_of(stage)}'{other} again; finished shards are kept."
    )


def damaged_file_advice(path: str) -> str:
    """The advice for a damaged JSON file of a stage, run or database. path: with its folders; or a URL."""
    folder, _, name = path.rpartition("/")
    commands = (COMMAND_OF_FOLDER.get(part) for part in reversed(folder.split("/")))
    command = next(filter(None, commands), "the command that wrote the folder (for a database, 'laion-rdm build')")
    move = f"move {path} out of its folder" if "://" in path else f"run 'mv {shlex.quote(path)} damaged-{name}'"
    return (
        f"Restore it from a copy. Without a copy, {move} (keep the other files of its folder), and run {command} again;"
        " finished shards are kept."
    )
