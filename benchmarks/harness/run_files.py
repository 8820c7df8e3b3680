"""Result files of runs that several processes share: a run is claimed, and its file written once, at its end."""

import contextlib
import fcntl
import json
import os


def read_result(path):
    """What a finished run measured; None where it has not finished."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def write_result(path, result):
    """The whole file or none of it, one line a key."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{{\n{lines}\n}}\n")
    temporary.replace(path)


@contextlib.contextmanager
def claimed(path):
    """Whether this process may measure the run of this result file: it is unfinished, and no other process is at it.

    The claim is a lock on a file beside it, which the system gives up when its process ends in any way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_suffix(".lock")
    lock = os.open(lock_path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            # The process that had the lock before may have removed the file meanwhile: then this locks nothing.
            yield _is_file(lock, lock_path) and not path.is_file()
        finally:
            if _is_file(lock, lock_path):
                lock_path.unlink()
    finally:
        os.close(lock)


def _is_file(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
