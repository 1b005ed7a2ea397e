"""Shared by the commands: the console command, recipes, arguments and errors.

No public names here: `laion-rdm --help` must not wait for the imports of recipes.
"""
