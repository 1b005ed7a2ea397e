"""A rank that waits until it is ended: `python -m waiting_rank FOLDER` writes a file named as its process id."""

import os
import sys
import time
from pathlib import Path

from trainer.training.launch import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)
