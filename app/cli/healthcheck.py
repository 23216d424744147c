"""`python -m app.cli.healthcheck [--wait=SECONDS] [URL ...]`: the container's HEALTHCHECK. It runs every few seconds,
so it is plain standard library and imports nothing of the product.

Exit code 0 when every URL answers with 200, otherwise 1 and the reason. Without one it asks `/healthz` of this
process: on the metrics port, which every role has, or on the API's where that is off. With `--wait` it asks again for
so long.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

#: Less than the time-out of the container's health check, so that the reason is seen.
TIMEOUT = 4.0


def main(arguments: Sequence[str]) -> int:
    """Ask each; the exit code."""
    urls = [each for each in arguments if not each.startswith("--wait=")]
    end = time.monotonic() + sum(float(each.removeprefix("--wait=")) for each in arguments if each not in urls)
    while (faults := [fault for url in urls or [_own()] if (fault := _fault(url))]) and time.monotonic() < end:
        time.sleep(1)
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    return 1 if faults else 0


def _own() -> str:
    port = os.environ.get("TRELLIS_METRICS_PORT", "0")
    if port in {"", "0"}:
        port = os.environ.get("TRELLIS_API_PORT", "8000")
    return f"http://127.0.0.1:{port}/healthz"


def _fault(url: str) -> str | None:
    # A proxy that the environment names has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code} {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # ValueError: TRELLIS_METRICS_PORT or TRELLIS_API_PORT is no number.
        return f"{url}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
