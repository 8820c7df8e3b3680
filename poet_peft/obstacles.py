"""What is in the way of a rotation, in the words of errors and warnings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Obstacle(NamedTuple):
    """Why something is not rotated, and what can be done about it beside leaving it out; "" if nothing can."""

    reason: str
    way_out: str = ""

    def refusal(self, what: str, setting: str) -> str:
        """The text of an error, where `setting` names what cannot be rotated."""
        ways_out = f"{self.way_out}, or take" if self.way_out else "Take"
        return f"POET cannot rotate {what}: {self.reason}. {ways_out} it out of {setting}."

    def warning(self, requested: object, names: Iterable[str]) -> str:
        """The text of a warning, where these are left out.

        Args:
            requested: `target_modules` as the user wrote it.
        """
        way_out = f" {self.way_out}." if self.way_out else ""
        return f"target_modules={requested!r} leaves out {', '.join(without_indexes(names))}: {self.reason}.{way_out}"


def without_indexes(names: Iterable[str]) -> list[str]:
    """Names with `*` for the index of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
