"""What each rank runs in test_train: `python -m train_rank RECIPE.json ROOT`."""

import logging
import sys
from pathlib import Path

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.recipe import Training
from trainer.training.train import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(Training.model_validate_json(Path(sys.argv[1]).read_text()), Root(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
