"""Trains as one rank, for tests: `python -m train_rank RECIPE.json ROOT [RECIPE_OF_RANK_1.json]`."""

import logging
import os
import sys
from pathlib import Path

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.recipe import TrainingRecipe
from trainer.training import previews
from trainer.training.train import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = sys.argv[-1] if len(sys.argv) == 4 and os.environ["RANK"] == "1" else sys.argv[1]
    previews.STEPS = 4  # of the sampler: each is a pass of the network
    try:
        run(TrainingRecipe.model_validate_json(Path(recipe).read_text()), Root(sys.argv[2]))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: the ranks share a log
        sys.exit(1)
