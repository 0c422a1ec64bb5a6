"""The child process that speaks to a hub: `python -m services.gateway.hub_child plan | fetch ...`.

What a hub answers is a stranger's: it is read by a process with limits and without our secrets, which writes into one folder.
The hub's own library speaks; which hub, and through which proxy, is said by its environment variables. The answer is one
JSON object on the standard output.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.gateway.hub_files import choose_files
from shared.model_files import ModelFolderError, ModelFolderLimits

ADDRESS_SPACE_BYTES = 4 * 1024**3
CPU_S = 3600
TIMEOUT_S = 20.0


class HubRefusal(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def plan(repository: str, revision: str | None) -> dict[str, Any]:
    """Which commit a revision is, and which of its files make a model."""
    from huggingface_hub import HfApi

    info = _ask(lambda: HfApi(token=False).model_info(
        repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S
    ))  # fmt: skip
    listed = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    return {"commit": str(info.sha), "files": choose_files(listed, ModelFolderLimits())}


def fetch(repository: str, commit: str, into: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Download these files of a commit; each must have the size that the plan said."""
    from huggingface_hub import hf_hub_download

    for name, size_bytes in sizes.items():

        def download(name: str = name) -> str:
            return hf_hub_download(repository, name, revision=commit, local_dir=into, token=False)

        _ask(download)
        if (into / name).stat().st_size != size_bytes:
            raise HubRefusal("hub_error", f"the hub sent another {name} than it listed")
    shutil.rmtree(into / ".cache", ignore_errors=True)
    return {"fetched": len(sizes)}


def _ask(call: Callable[[], Any]) -> Any:
    """Run a call of the library, whose refusals become ours."""
    import httpx2
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise HubRefusal(
            "hub_model_not_found", "the repository is gated; only open ones are fetched"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubRefusal("hub_model_not_found", "the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise HubRefusal(
            "hub_model_not_found", "the hub has no such repository, or it is not open"
        ) from error
    except (httpx2.TransportError, errors.HfHubHTTPError, OSError) as error:
        # The library tells of a file's refusal as of a file that is not in its cache.
        refused = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if isinstance(refused, errors.HfHubHTTPError):
            message = f"the hub answered with an error ({refused.response.status_code})"
            raise HubRefusal("hub_error", message) from error
        if isinstance(error, httpx2.TransportError | errors.LocalEntryNotFoundError):
            raise HubRefusal(
                "hub_unreachable", f"the hub cannot be reached ({type(error).__name__})"
            ) from error
        if isinstance(error, errors.FileMetadataError):
            raise HubRefusal("hub_error", "the hub does not say enough of a file") from error
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise HubRefusal(
            "hub_error", f"the hub's answer is not understood ({type(error).__name__})"
        ) from error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.hub_child")
    parser.add_argument("call", choices=("plan", "fetch"))
    parser.add_argument("question", type=json.loads, help="the call's arguments, a JSON object")
    options = parser.parse_args(arguments)
    question = options.question
    largest = max(question.get("sizes", {}).values(), default=0)
    _limit_this_process(largest + 16 * 1024**2)
    try:
        if options.call == "plan":
            answer = plan(question["repository"], question["revision"])
        else:
            answer = fetch(
                question["repository"], question["commit"], Path(question["into"]), question["sizes"]
            )
    except HubRefusal as refusal:
        answer = {"error": {"code": refusal.code, "message": str(refusal)}}
    except ModelFolderError as refusal:
        answer = {"error": {"code": refusal.code.value, "message": refusal.message}}
    except OSError as error:
        answer = {
            "error": {"code": "store_full", "message": f"a file could not be written ({error.strerror})"}
        }
    print(json.dumps(answer))
    return 0


def _limit_this_process(file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    # A hub that sends more than it listed ends this process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGXCPU, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
