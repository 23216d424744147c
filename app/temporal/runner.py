"""The workflow sandbox, without what it does again for every run and every payload.

The SDK's runs every workflow module anew for each run, and enters the sandbox once for each payload to ask for the
context of a codec. Together they were a quarter of a worker's CPU time (docs/decisions/0041-lean-sandbox.md). Neither
is needed here: the modules keep nothing between runs, and no converter of ours looks at a context.
"""

from __future__ import annotations

from typing import Any, Final

from temporalio.converter import StorageDriverStoreContext
from temporalio.worker import WorkflowInstance, WorkflowInstanceDetails, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

#: Everything of ours, so that nothing is imported again for a run.
_PASSING: Final = SandboxRestrictions.default.with_passthrough_modules("app")


def runner(*, strict: bool = False) -> WorkflowRunner:
    """Sandboxed runs of modules that are loaded once.

    What the sandbox then no longer sees, such as a workflow that asks for the time, tests see that run `strict`.
    """
    return _LeanRunner(restrictions=SandboxRestrictions.default if strict else _PASSING)


class _LeanRunner(SandboxedWorkflowRunner):
    # Without a constructor of its own: plugins make copies with other restrictions.

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        return _WithoutContext(super().create_instance(det))


class _WithoutContext(WorkflowInstance):
    """A workflow whose payloads need no context."""

    def __init__(self, inner: WorkflowInstance) -> None:
        self._inner = inner

    def activate(self, act: Any) -> Any:
        return self._inner.activate(act)

    def get_info(self) -> Any:
        return self._inner.get_info()

    def get_thread_id(self) -> int | None:
        return self._inner.get_thread_id()

    def get_serialization_context(self, command_info: Any) -> None:  # noqa: ARG002 - part of the interface
        return None

    def get_external_store_context(self, command_info: Any) -> StorageDriverStoreContext:  # noqa: ARG002 - likewise
        return StorageDriverStoreContext(target=None)
