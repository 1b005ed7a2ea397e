"""The exceptions for what the user can correct. Any other exception is a defect and keeps its traceback."""


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
