"""The demo: train a small XSwin on the embedded shapes, draw every class, score what was drawn.

make demo
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RUN = ROOT / "runs" / "quickstart"
CONFIG = ROOT / "configs" / "quickstart.yaml"
PER_CLASS = 20


def main() -> None:
    """Train, sample, score; a step that fails ends the demo with its status."""
    began = time.time()
    shutil.rmtree(RUN, ignore_errors=True)

    say("1/4", f"training {CONFIG.relative_to(ROOT)}")
    launch("accelerate.commands.launch", *ONE_PROCESS, str(ROOT / "train.py"), "--config", str(CONFIG))

    say("2/4", "drawing samples of every class")
    sample = ("--checkpoint", str(RUN))
    launch(str(ROOT / "sample.py"), *sample, "--num_per_class", "6", "--output", str(RUN / "samples.png"))
    drawn = RUN / "samples.npz"
    launch(str(ROOT / "sample.py"), *sample, "--num_per_class", str(PER_CLASS), "--output", str(drawn))

    say("3/4", "training a small classifier on true shapes")
    launch(
        str(ROOT / "scripts" / "recognise.py"),
        *("--samples", str(drawn), "--data.path", "shapes", "--data.num_images", "2000"),
        *("--classifier", str(RUN / "classifier.pt"), "--output", str(RUN / "recognised.json")),
    )
    share = json.loads((RUN / "recognised.json").read_text())["class_agreement"]

    say("4/4", "scoring")
    launch(
        str(ROOT / "evaluate.py"),
        *("--samples", str(drawn), "--checkpoint", str(RUN)),
        *("--extractor", str(RUN / "classifier.pt"), "--output", str(RUN / "scores.json")),
    )
    scores = json.loads((RUN / "scores.json").read_text())
    scores["class_agreement"] = share
    (RUN / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")

    print()
    print(f"The classifier agrees with the class asked for on {share:.1%} of {10 * PER_CLASS} samples.")
    print(f"picture: {(RUN / 'samples.png').relative_to(ROOT)}")
    print(f"scores:  {(RUN / 'scores.json').relative_to(ROOT)}")
    print(f"The demo took {(time.time() - began) / 60:.1f} minutes.")


def launch(program: str, *arguments: str) -> None:
    """Run a program of the project as a user would."""
    command = [sys.executable, *(["-m"] if not program.endswith(".py") else []), program, *arguments]
    status = subprocess.run(command, check=False, cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def say(part: str, what: str) -> None:
    """A heading between the programs' own output."""
    print(f"\n[{part}] {what}", flush=True)


ONE_PROCESS = (
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)

if __name__ == "__main__":
    main()
