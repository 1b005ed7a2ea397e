"""Training runs started by tests that need nothing but their end."""

import os
import subprocess
import sys
from pathlib import Path

from retrieval.storage import Root
from trainer.recipe import Training

LAUNCH = "import sys; from trainer.launch import launch; sys.exit(launch(sys.argv[1:], ranks={ranks}))"
HERE = Path(__file__).parent


def train(recipe: Training, root: Root, ranks: int = 1) -> str:
    """Trains to the end on some ranks. Returns the log."""
    path = root.local_path("recipe.json")
    path.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", LAUNCH.format(ranks=ranks), "train_rank", str(path), root.url]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def folder_of(recipe: Training, root: Root) -> Path:
    """The run's folder."""
    return root.local_path(recipe.train.folder)
