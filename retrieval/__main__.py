"""`python -m retrieval COMMAND DB`: the commands of `retrieval.cli.commands`."""

import sys

from retrieval.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m retrieval"))
