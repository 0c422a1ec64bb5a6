"""The containers' health check: `python -m infra.docker.probe /readyz` asks this container's service, on its OPS_PORT.

Exit status 0: it answers 200. 1: it does not, and one line says why. The image has no curl, and needs none.
"""

from __future__ import annotations

import http.client
import os
import sys

# Shorter than the time-out of the health checks in docker-compose.yml, so that the reason is told.
TIMEOUT_S = 3.0


def refusal(port: int, path: str) -> str | None:
    """Why `path` on this machine's `port` does not answer 200; None when it does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{path} on port {port} does not answer: {error or type(error).__name__}"
    finally:
        connection.close()
    return None if response.status == 200 else f"{path} answers {response.status}: {body}"


def main() -> int:
    port = os.environ.get("OPS_PORT", "")
    if len(sys.argv) != 2 or not port.isdigit():
        print("usage: OPS_PORT=PORT python -m infra.docker.probe PATH", file=sys.stderr)
        return 64
    reason = refusal(int(port), sys.argv[1])
    if reason is not None:
        print(reason, file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
