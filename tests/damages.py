"""Damage to the files of a checkpoint, for the tests of what is refused."""

import json


def cut(num_bytes):
    return lambda path: path.write_bytes(path.read_bytes()[:num_bytes])


def edit_json(**values):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
