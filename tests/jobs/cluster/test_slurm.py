"""The Slurm example with stand-ins of Slurm's programs: what it starts on the machines of a job."""

import json
import subprocess
import sys
from pathlib import Path

import torch.distributed.run as torchrun

from jobs.cli.recipe import load_recipe
from jobs.train import parse_arguments
from trainer.engine.deepspeed_engine import accumulation_steps
from trainer.recipe import TrainConfig

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "examples/slurm/train.sbatch"
SRUN = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames gpu-[03,07-09]" ] && printf 'gpu-03\\ngpu-07\\ngpu-08\\ngpu-09\\n'
"""
JOB = {
    "SLURM_JOB_ID": "4212345",
    "SLURM_JOB_NODELIST": "gpu-[03,07-09]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "96",
}


def test_the_example_starts_torchrun_on_all_machines_with_the_command_in_its_head(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    head = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("# start"))
    words = head.partition("examples/slurm/train.sbatch")[2].split()
    environment = JOB | {"PATH": f"{tmp_path}:/usr/bin:/bin", "AWS_ACCESS_KEY_ID": "key"}
    output = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, check=True)
    command, variables = json.loads(output.stdout)
    assert command[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=96", ".venv/bin/torchrun"]
    assert variables["AWS_ACCESS_KEY_ID"] == "key"
    options = torchrun.get_args_parser().parse_args(command[3:])
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("4", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "gpu-03:22345", "4212345")
    assert (options.module, options.training_script) == (True, "jobs.train")
    arguments = parse_arguments(options.training_script_args)
    recipe = load_recipe(REPOSITORY / arguments.recipe, arguments.overrides)
    assert accumulation_steps(recipe[TrainConfig], 4 * 8) == 1
