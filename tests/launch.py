"""Starts a worker in two processes, as a user would."""

import os
import subprocess
import sys
from pathlib import Path


WORKERS = Path(__file__).parent / "workers"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `--cpu` starts one process whatever `--num_processes` says; the case asks for the CPU itself.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launch(launcher, script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(WORKERS / script), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-5000:]
