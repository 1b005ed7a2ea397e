"""The command `laion-rdm capacity`: storage, bandwidth, hours and cost of each stage of a recipe, calculated.

`plan.py` computes them from the recipe and `rates.toml`, `tables.py` prints them.
"""
