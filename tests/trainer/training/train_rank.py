"""Trains as one rank, for tests: `python -m train_rank RECIPE.json ROOT`."""

import logging
import sys
from pathlib import Path

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.recipe import TrainingRecipe
from trainer.training.train import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(TrainingRecipe.model_validate_json(Path(sys.argv[1]).read_text()), Root(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
