"""Upload a checkpoint to the hub, with a model card generated from its run's files.

    hf auth login                                                             # once, or HF_TOKEN=...
    python scripts/push_to_hub.py --checkpoint runs/XSwin --repo me/xswin-caltech101 --license mit
    python scripts/push_to_hub.py --checkpoint runs/XSwin --repo me/xswin-caltech101 --dry_run card

Then `sample.py --checkpoint hf://me/xswin-caltech101` works anywhere. Only huggingface_hub reads the token.
"""

import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main


@dataclass(frozen=True)
class PushConfig:
    """Upload EMA weights, configuration, curves, samples, scores and a model card.

    Args:
        checkpoint: a run's folder, a checkpoint, or its ema.safetensors
        repo: owner/name on the hub; created if it does not exist
        license: license of the weights, by the hub's names: 'mit', 'apache-2.0', 'cc-by-nc-4.0', 'other', ...
        private: make a new repository private
        dry_run: write the files to this folder, and upload nothing
        half: round the weights to float16, which halves the size; sampling converts them to float32
    """

    checkpoint: str = field(metadata={"reads": "checkpoint"})
    repo: str
    license: str = "other"
    private: bool = False
    dry_run: Path | None = None
    half: bool = False


def main(config: PushConfig) -> None:
    """Write the model card and push all files as one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    from checkpoints.checkpoint import open_checkpoint, read_tensors
    from checkpoints.hub import HubError
    from machine.atomic_files import check_empty
    from machine.hugging_face import describe_error
    from sharing.model_card import SHOWN, write_folder

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.repo):
        raise ValueError(f"--repo {config.repo}: give owner/name")
    if config.dry_run:
        check_empty(config.dry_run, "--dry_run")  # in a run's folder, files would be overwritten
    checkpoint = open_checkpoint(config.checkpoint)
    read_tensors(checkpoint.path)  # raises if the file is damaged
    if config.dry_run:
        names = write_folder(checkpoint, config.repo, config.license, config.dry_run, half=config.half)
        return print(f"would upload {', '.join(names)}: {config.dry_run}")

    message = f"{checkpoint.spec.name}, step {checkpoint.step}"
    with tempfile.TemporaryDirectory() as folder:
        names = write_folder(checkpoint, config.repo, config.license, Path(folder), half=config.half)
        additions = [CommitOperationAdd(name, Path(folder, name)) for name in names]
        try:
            api = HfApi()
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            outdated = {*SHOWN} & {*api.list_repo_files(config.repo)} - {*names}  # such as scores of other weights
            deletions = [CommitOperationDelete(name) for name in sorted(outdated)]
            commit = api.create_commit(config.repo, [*additions, *deletions], commit_message=message)
        except (HTTPError, OSError, RuntimeError) as error:
            raise HubError(
                f"--repo {config.repo}: the hub did not take it ({describe_error(error)}); log in with `hf auth login` "
                "or HF_TOKEN, or use --dry_run FOLDER"
            ) from error
    return print(f"{commit.commit_url}\npython sample.py --checkpoint hf://{config.repo}")


if __name__ == "__main__":
    run_main(main, PushConfig)
