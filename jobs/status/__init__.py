"""The command `laion-rdm status`: the progress of each stage of a recipe, read from its files.

`stages.py` collects it, `training.py` adds the steps of a training run, `table.py` prints it.
"""
