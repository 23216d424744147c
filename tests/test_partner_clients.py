"""Who the partners are, and how they are called: the sandbox only when it is asked for, credentials, limits."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
import structlog

from app.metrics import REGISTRY
from app.partners import open_partners
from app.settings import Settings, SettingsError, load
from app.wiring import open_services

# --- the sandbox is asked for, never fallen back to -----------------------------------------------------------


SERVING = (
    ("-m", "app", "api"),
    ("-m", "app", "worker", "default"),
    ("-m", "app", "run-all"),
    ("-m", "uvicorn", "app.main:app"),
)


async def ended(*command: str, **environment: str) -> tuple[int | None, str]:
    """Exit code and output of a process that ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        env={**os.environ, "TRELLIS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("command", SERVING, ids=lambda command: command[2])
async def test_without_partners_a_serving_process_ends_and_names_the_variables(command: tuple[str, ...]) -> None:
    code, output = await ended(*command)
    assert code != 0
    for variable in ("TRELLIS_PAYMENT_URL", "TRELLIS_CARRIER_URL", "TRELLIS_SANDBOX"):
        assert variable in output
    assert output.startswith("trellis: ")
    assert output.count("\n") == 1, output


async def test_without_partners_no_command_opens_them() -> None:
    with pytest.raises(SettingsError, match=r"TRELLIS_PAYMENT_URL and TRELLIS_CARRIER_URL are not set; .*_SANDBOX=true"):
        async with open_services(Settings()):
            pass


@pytest.mark.parametrize(("given", "missing"), [("payment_url", "CARRIER_URL"), ("carrier_url", "PAYMENT_URL")])
def test_half_of_the_partners_is_refused_unless_the_sandbox_is_asked_for(given: str, missing: str) -> None:
    half = {given: "https://partner.example"}
    with pytest.raises(SettingsError, match=f"TRELLIS_{missing} is not set") as refused:
        load(**half).require_partners()
    assert f"TRELLIS_{given.upper()}" not in str(refused.value)
    load(**half, sandbox=True).require_partners()


def test_both_partners_or_the_sandbox_are_enough() -> None:
    load(payment_url="https://money.example", carrier_url="https://parcels.example").require_partners()
    load(sandbox=True).require_partners()
    assert load(payment_url="", carrier_url="").payment_url is None
    assert Settings().sandbox is False


async def test_the_gauge_and_the_log_tell_that_the_sandbox_is_in_use(settings: Settings) -> None:
    def gauge(partner: str) -> float | None:
        return REGISTRY.get_sample_value("trellis_sandbox_in_use", {"partner": partner})

    with structlog.testing.capture_logs() as lines:
        async with open_partners(settings.model_copy(update={"carrier_url": "https://parcels.example"})):
            assert (gauge("payment"), gauge("carrier")) == (1, 0)
        [line] = lines
        assert (line["log_level"], line["payment"], line["carrier"]) == ("warning", "sandbox", "real")
        real = {"payment_url": "https://money.example", "carrier_url": "https://parcels.example", "sandbox": True}
        async with open_partners(settings.model_copy(update=real)):
            assert (gauge("payment"), gauge("carrier")) == (0, 0)
        assert lines == [line]
