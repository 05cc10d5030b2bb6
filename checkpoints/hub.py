"""Names that are accepted wherever a path to a checkpoint is: `hf://owner/name`, which is downloaded from the hub to
`runs/owner--name`, and `embedded`, the checkpoint in `assets/`."""

import re
from pathlib import Path

from machine.hugging_face import SCHEME, describe_error

EMBEDDED, ASSET = "embedded", Path(__file__).resolve().parent.parent / "assets" / "checkpoint"


class HubError(ValueError):
    """A download from the hub failed; the message says why in one line."""


def is_checkpoint_name(path: str | Path) -> bool:
    """Whether this is one of the names above rather than a path."""
    return str(path) == EMBEDDED or str(path).startswith(SCHEME)


def resolve_to_file(path: str | Path, file: str) -> Path:
    """Return a path unchanged; for a name, return the path of `file`, downloaded unless it is cached."""
    if not is_checkpoint_name(path):
        return Path(path)
    if str(path) == EMBEDDED:
        if any((Path(EMBEDDED) / name).exists() for name in ("checkpoints", file)):
            raise HubError(f"{path}: the clone's own checkpoint, or this folder's? Call the folder something else")
        return ASSET / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

    repo, _, revision = str(path).removeprefix(SCHEME).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise HubError(f"{path}: not the name of a repository; write hf://owner/name, or hf://owner/name@revision")
    folder = Path("runs") / (repo.replace("/", "--") + (f"@{revision.replace('/', '--')}" if revision else ""))
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None, local_dir=folder))
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{path}: no network, and {folder} does not hold it from before ({describe_error(error)})"
        ) from error
    except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
        raise HubError(f"{path}: the hub does not serve {file} of it ({describe_error(error)})") from error
