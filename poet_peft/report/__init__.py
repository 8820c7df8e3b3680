"""One self-contained page of HTML that says what training did to a model."""

from .page import write_report


__all__ = ["write_report"]
