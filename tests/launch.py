"""Starts processes as a user would: by a launcher, or scripts one after the other."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed import TCPStore


WORKERS = Path(__file__).parent / "workers"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `--cpu` starts one process whatever `--num_processes` says; the case asks for the CPU itself.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}


def launch(launcher, script, *arguments):
    """Run a worker in two processes."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(WORKERS / script), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-5000:]


class Forks:
    """Runs what follows `python`, `SCRIPT ...` or `-m MODULE ...`, in forks of one new process.

    That process has imported the libraries, which takes longer than the runs do. It is started at the first run, with
    as many threads as there are here.
    """

    def __init__(self):
        self._server = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=60)

    def run(self, *arguments, timeout=300):
        """A `subprocess.CompletedProcess`. One that takes longer than `timeout` seconds ends by a signal."""
        (process,) = self._run([{}], *arguments, timeout=timeout)
        return process

    def launch(self, script, *arguments):
        """Run a worker in two processes, in the environment that torchrun gives it."""
        # Listens from here on, as torchrun's does, so that no other process can take its port.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in ("0", "1")]
        processes = self._run(ranks, WORKERS / script, *arguments, timeout=600)
        # Of all: where one fails, the others are killed, and have nothing to say.
        failed = [f"exit status {p.returncode}\n{p.stderr[-5000:]}" for p in processes if p.returncode]
        assert not failed, "\n".join(failed)

    def _run(self, environments, *arguments, timeout):
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(WORKERS / "fork_server.py")],
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as directory:
            places = [str(Path(directory, str(number))) for number in range(len(environments))]
            processes = [
                {"command": command, "directory": place, "cwd": os.getcwd(), "environment": extra, "timeout": timeout}
                for place, extra in zip(places, environments, strict=True)
            ]
            print(json.dumps(processes), file=self._server.stdin, flush=True)
            returncodes = json.loads(self._server.stdout.readline())
            return [
                subprocess.CompletedProcess(command, code, *(Path(p, n).read_text() for n in ("stdout", "stderr")))
                for code, p in zip(returncodes, places, strict=True)
            ]
