"""The exception for mistakes that the user can correct. Any other exception is a defect and keeps its traceback."""


class UserError(Exception):
    """A mistake in a recipe, folder or file. Says where, what was found, what was expected and what to do.

    Commands print it without a traceback and exit with code 2.
    """
