"""`python -m app.cli.healthcheck`: the container's HEALTHCHECK. Standard library only, as it runs every few seconds.

Exit code 0 when the process in this container answers with 200, 1 otherwise, with the reason. `/healthz` is asked, or
the path that is given: `/readyz` waits for the servers behind it as well.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Ask once; the exit code."""
    path = arguments[0] if arguments else "/healthz"
    url = f"http://127.0.0.1:{os.environ.get('TRELLIS_API_PORT', '8000')}{path}"
    # A proxy of the environment has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except urllib.error.HTTPError as error:
        sys.stderr.write(f"{url}: {error.code} {error.read(500).decode(errors='replace')}\n")
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
