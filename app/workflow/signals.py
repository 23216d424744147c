"""Counting what becomes of a customer's signals, from inside the workflows that decide it.

Workflow code cannot reach the metrics: its sandbox lets nothing out but what the worker hands in. A worker hands in
one function; where none does, as in a replay or a test, nothing is counted.
"""

from __future__ import annotations

from typing import Final, Literal

from temporalio import workflow

#: Name under which the worker hands in `(signal, outcome) -> None`.
COUNT: Final = "trellis_count_signal"

Signal = Literal["approve", "cancel", "address"]
Outcome = Literal["accepted", "ignored", "refused"]


def count(signal: Signal, outcome: Outcome) -> None:
    """Count it once: not when history is replayed."""
    counter = workflow.extern_functions().get(COUNT)
    if counter is not None and not workflow.unsafe.is_replaying_history_events():
        counter(signal, outcome)
