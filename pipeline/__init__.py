"""The data stages: from LAION metadata to downloaded images, embeddings, databases and neighbor tables.

A stage is a room or a module with a function `run`; its settings are in `recipe`.
"""
