"""Text of strangers, fit for a terminal or an answer. Loads nothing, as commands print before they load more."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without what would steer a terminal, or cannot be seen: notes, reasons and names are written by strangers."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
