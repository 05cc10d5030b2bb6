"""The demo: train a small XSwin on the procedural shapes, sample every class, and score the samples.

make demo
python scripts/demo.py --experiment EXPERIMENT.yaml --folder scratch      (another training, elsewhere)
"""

import json
import os
import shlex
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.cli import run_main
from machine import children
from machine.atomic_files import sha256_of, unused_path
from machine.checkpoint_folder import CHECKSUMS
from machine.lock import Lock
from settings import reads

ROOT = Path(__file__).resolve().parent.parent
STARTED = Path.cwd()
RUN = Path("runs", "quickstart")
CONFIG = ROOT / "configs" / "quickstart.yaml"
MADE = "demo"  # file in the run that lists the checkpoints which the demo made
PER_CLASS = 20


@dataclass(frozen=True)
class DemoConfig:
    """Train, sample and score. If a program fails, the demo ends with its status.

    Args:
        experiment: YAML file of the training
        folder: folder of runs/ and cache/; an earlier demo in its runs/quickstart is deleted, and a training of your
            own there is renamed
    """

    experiment: Path = reads("file", CONFIG)
    folder: Path = ROOT


def main(config: DemoConfig) -> None:
    """Run the programs one after the other, as a user would."""
    start, experiment = time.time(), config.experiment.resolve()
    config.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(config.folder)
    with Lock(RUN / "training.lock"):  # as a training may be running there
        made_by_demo = (RUN / MADE).read_text().split() if (RUN / MADE).exists() else []
        if checkpoints().difference(made_by_demo):
            print(f"{RUN} is a training that no demo has made, and is now {RUN.rename(unused_path(RUN))}")
        shutil.rmtree(RUN, ignore_errors=True)

    say("1/4", f"training {display_path(experiment)}")
    launch("train.py", "--config", experiment, "--name", RUN.name)
    (RUN / MADE).write_text("\n".join(checkpoints()))

    say("2/4", "generating samples of every class")
    samples, classifier, recognised = RUN / "samples.npz", RUN / "classifier.pt", RUN / "recognised.json"
    launch("sample.py", "--checkpoint", RUN, "--num_per_class", 6, "--output", RUN / "samples.png")
    launch("sample.py", "--checkpoint", RUN, "--num_per_class", PER_CLASS, "--output", samples)

    say("3/4", "training a small classifier on real shapes")
    true_shapes = ("--data.path", "shapes", "--data.num_images", 2000)
    outputs = ("--classifier", classifier, "--output", recognised)
    launch("scripts/recognise.py", "--samples", samples, *true_shapes, *outputs)
    agreement = json.loads(recognised.read_text())["class_agreement"]

    say("4/4", "scoring")
    scorer = ("--extractor", classifier, "--output", RUN / "scores.json")
    launch("evaluate.py", "--samples", samples, "--checkpoint", RUN, *scorer)
    scores = json.loads((RUN / "scores.json").read_text())
    scores["class_agreement"] = agreement
    (RUN / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")

    print(f"\nThe classifier recognises the requested class in {agreement:.1%} of {10 * PER_CLASS} samples.")
    print(f"picture: {display_path(RUN / 'samples.png')}")
    print(f"scores:  {display_path(RUN / 'scores.json')}")
    print(f"The demo took {(time.time() - start) / 60:.1f} minutes.")


def checkpoints() -> set[str]:
    """Names of the checkpoints with hashes of their checksums, as a training of the user's may have the same steps."""
    found = [(path.name, path / CHECKSUMS) for path in RUN.glob("checkpoints/[0-9]*")]
    return {f"{name}-{sha256_of(checksums)}" if checksums.is_file() else name for name, checksums in found}


def launch(program: str, *arguments: object) -> None:
    """Run a program. A signal lets it save; the last line then says how to continue."""
    try:
        children.run_process([sys.executable, str(ROOT / program), *map(str, arguments)])
    except children.EndedBySignal:
        with suppress(OSError):  # if the terminal is closed
            print(f"\nstopped; {resume_hint(program)}", flush=True)
        raise


def resume_hint(program: str) -> str:
    """Say how to continue an interrupted demo. Only the training is resumed, as the other steps are short."""
    again = shlex.join([display_path(Path(sys.executable)), *sys.argv])
    if not any(RUN.glob("checkpoints/[0-9]*")):
        return f"nothing was saved yet; start again with: {again}"
    if program != "train.py":
        return f"the trained model is in {display_path(RUN)}; start again with: {again}"
    if Path.cwd() == STARTED:
        return f"continue with: {display_path(Path(sys.executable))} {display_path(ROOT / 'train.py')} --resume {RUN}"
    return f"continue with: cd {shlex.quote(str(Path.cwd()))} && {sys.executable} {ROOT / 'train.py'} --resume {RUN}"


def say(part: str, what: str) -> None:
    print(f"\n[{part}] {what}", flush=True)


def display_path(path: Path) -> str:
    """Format a path relative to the folder in which the demo was started, if it lies there."""
    absolute = Path.cwd() / path
    return str(absolute.relative_to(STARTED) if absolute.is_relative_to(STARTED) else absolute)


if __name__ == "__main__":
    run_main(main, DemoConfig)
