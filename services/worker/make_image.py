"""`python -m services.worker.make_image REQUEST`: makes one image; a child of a worker, so that what goes wrong ends only it.

The folder is compared with its manifest first, so an image is never made of anything but what was registered.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_NICENESS = 10
"""A tenth of what a process that answers gets of a processor that both want."""


def main() -> int:
    os.nice(_NICENESS)
    # After the nice: these take seconds.
    import torch

    from services.worker.engine import EngineConfig, ModelRefusal
    from services.worker.engine.images.convert import convert
    from services.worker.model_files import ModelUnavailable, read_manifest, verify_files

    request = json.loads(sys.argv[1])
    folder, config = Path(request["folder"]), EngineConfig(**request["config"])
    torch.set_num_threads(1)
    try:
        verify_files(folder, read_manifest(folder))
        convert(folder, Path(request["path"]), request["key"], config)
    except (ModelRefusal, ModelUnavailable, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
