"""`PYTHON_EXEC forked_children.py -m MODULE ...` runs a module in a fork whose child processes are forks too."""

import os
import runpy
import sys

sys.executable = os.environ["PYTHON_EXEC"]
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
