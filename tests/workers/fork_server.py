"""Runs scripts, each in a fork of this process, which has imported the libraries; see `launch.Forks`.

Reads a line for each group of processes that run at the same time, a JSON list: of each its command, where it runs,
what is added to its environment, where its output goes, and after how many seconds it is killed. Answers with the list
of their return codes, once all have ended; where one fails, the others are killed.
"""

import atexit
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

# What the examples and the workers import.
import classify  # noqa: E402, F401
import finetune  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import pretrain  # noqa: E402, F401
import training_loop  # noqa: E402, F401
from models import load_gguf_fast  # noqa: E402
from workers import resume_run  # noqa: E402, F401


def become(command, directory, cwd, environment, timeout):
    """Become the process of a script."""
    signal.alarm(timeout)
    os.chdir(cwd)
    os.environ |= environment
    os.mkdir(directory)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    returncode = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit:
        returncode = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        returncode = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(returncode)


def start(process):
    pid = os.fork()
    if pid == 0:
        become(**process)
    return pid


def main():
    load_gguf_fast()
    for line in sys.stdin:
        returncodes = dict.fromkeys(map(start, json.loads(line)))
        for _ in range(len(returncodes)):
            ended, status = os.wait()
            returncodes[ended] = os.waitstatus_to_exitcode(status)
            if returncodes[ended]:
                for pid, returncode in returncodes.items():
                    if returncode is None:
                        os.kill(pid, signal.SIGKILL)
        print(json.dumps(list(returncodes.values())), flush=True)


if __name__ == "__main__":
    main()
