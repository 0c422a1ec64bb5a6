"""The supervisor as a process of its own: `python -m infra.local.daemon HOME (all|servers)`. Started by `up`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.local.credentials import ensure_credentials
from infra.local.failures import SetupFailed
from infra.local.layout import Layout
from infra.local.ports import load_ports
from infra.local.process_spec import ProcessSpec
from infra.local.processes import Addresses, server_specs, service_specs
from infra.local.servers.postgres import data_folder
from infra.local.state import AlreadyLocked
from infra.local.supervisor import Supervisor, run_until_signalled


def build(layout: Layout, which: str, environ: Mapping[str, str]) -> tuple[Addresses, list[ProcessSpec]]:
    """The addresses and processes of a clone. Opens nothing.

    which: "all", or "servers" for the tests' set, which is faster and forgets on a power cut.
    """
    ports = load_ports(layout)
    if ports is None:
        raise SetupFailed(f"{layout.ports_file} is missing: run 'make up'")
    credentials = ensure_credentials(layout, servers_have_data=servers_have_data(layout))
    addresses, specs = server_specs(layout, ports, credentials, environ, durable=which == "all")
    if which == "all":
        specs += service_specs(layout, ports, credentials, environ, addresses, specs)
    return addresses, specs


def servers_have_data(layout: Layout) -> bool:
    """Whether a private server was set up with passwords of its own."""
    rabbitmq = layout.home / "rabbitmq" / "data"
    has_postgres = (data_folder(layout.home / "postgres") / "PG_VERSION").exists()
    return has_postgres or (rabbitmq.is_dir() and any(rabbitmq.iterdir()))


async def _run(layout: Layout, specs: list[ProcessSpec]) -> None:
    await run_until_signalled(Supervisor(layout, specs))


def main(argv: list[str]) -> int:
    layout = Layout(Path(argv[0]))
    try:
        _, specs = build(layout, argv[1], os.environ)
        asyncio.run(_run(layout, specs))
    except SetupFailed as failure:
        print(f"the supervisor cannot start: {failure}", file=sys.stderr)
        return 1
    except AlreadyLocked:
        print("another supervisor of this clone runs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
