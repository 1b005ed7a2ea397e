"""The one exception class that means "you can mend this".

The commands in `jobs` print its text alone and exit with code 2; every other exception is a defect
and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in a recipe, a folder or a file: says where, what was found, what was wanted, what to do."""
