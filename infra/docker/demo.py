"""The compose demo, one-shot: models into the import folder, then the demo team, its resource and a first answer.

The same steps as `make up`, through the same HTTP API; safe to repeat. The demo team's key is kept in the home folder,
since the platform shows a key only once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.local.demo import ensure_demo
from infra.local.demo_model import DemoModelError, ensure_demo_models
from infra.local.failures import SetupFailed
from infra.local.layout import write_private
from infra.local.management_api import ManagementApi
from infra.local.progress import fail, say
from shared.settings import SettingsError, env, load

KEY_FILE = "demo-key"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the one-shot reads from its environment."""

    url: str = env("ROUNDHOUSE_URL")
    """The gateway, as this container reaches it."""
    public_url: str = env("PUBLIC_URL")
    """The gateway, as the user reaches it: only printed."""
    admin_key: str = env("ROUNDHOUSE_ADMIN_KEY", secret=True)
    home: Path = env("ROUNDHOUSE_HOME")  # noqa: RUF009 (env makes a field)
    model_import_dir: Path = env("ROUNDHOUSE_MODEL_IMPORT_DIR")  # noqa: RUF009
    device_kind: str = env("ROUNDHOUSE_DEMO_DEVICE", "cpu")
    """What the demo's performance options ask for: `cpu` or `cuda`."""

    def __post_init__(self) -> None:
        if self.device_kind not in ("cpu", "cuda"):
            raise SettingsError("ROUNDHOUSE_DEMO_DEVICE must be cpu or cuda")


def set_up(settings: DemoSettings) -> str:
    """Make what is missing; return the words for the user. Raises SetupFailed or DemoModelError."""
    models = ensure_demo_models(settings.model_import_dir, lambda line: say(f"  {line}"))
    key_file = settings.home / KEY_FILE
    known_key = key_file.read_text().strip() if key_file.exists() else ""
    platform = ManagementApi(settings.url, settings.admin_key)
    demo = ensure_demo(platform, known_key, [model.name for model in models], settings.device_kind)
    if demo.key != known_key:
        write_private(key_file, demo.key + "\n")
    return (
        f"\n{demo.model} answered: {demo.answer}\n\n"
        f"  base URL   {settings.public_url}/v1\n"
        f"  key        docker compose run --rm --no-deps demo cat {key_file}\n"
        f"  console    {settings.public_url}/console\n"
        f"  model      {demo.model}"
    )


def main() -> int:
    try:
        say(set_up(load(DemoSettings, os.environ)))
    except SettingsError as problems:
        for line in str(problems).splitlines():
            fail(line)
        return 78
    except (SetupFailed, DemoModelError, OSError) as failure:
        fail(
            f"{failure} (here: 'docker compose ps', 'docker compose logs'; 'docker compose up demo' tries again)"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
