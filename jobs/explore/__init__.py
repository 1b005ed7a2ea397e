"""The explore page and its HTTP API: search databases, make pictures, compare styles.

Start it with `python -m jobs.explore RECIPE`.
"""
