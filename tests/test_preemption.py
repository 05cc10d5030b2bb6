"""What schedulers do to a training: their signals, and the launchers in between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from processes import PIXELS, ROOT, TINY, environment_of, log, script, unmeasured

from experiment.cli import parse, parse_run
from experiment.config import ExperimentConfig
from machine.lock import Lock
from training.inspection import Inspections

TRAIN = script("train.py")
SETTINGS = {**PIXELS, "name": "long", "train": {**TINY["train"], "num_steps": 100000}}
SETTINGS |= {"log": {"every": 1, "validate_every": 0, "trackers": []}}
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--num_processes"]
TRAINING = [str(ROOT / "train.py"), "--config", "long.yaml", "--resume", "auto"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def begun(folder, *command, **options):
    """Start a training that would take hours, and wait for its first step."""
    (folder / "long.yaml").write_text(yaml.safe_dump(SETTINGS))
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment_of(), **options)
    await_step(folder, process, 1)
    return process


def stopped_after(said):
    return int(said.split("stopped after ")[1].split()[0])


def await_step(folder, process, step):
    deadline = time.time() + 600
    while not (folder / "runs/long/log.jsonl").exists() or len(log(folder, "long")) < step:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.1)


def test_a_signal_interrupts_validation_and_samples_which_a_resumed_run_makes_up_for(tmp_path, monkeypatch):
    """Grids and scores take minutes, but a launcher waits only half a minute."""
    monkeypatch.chdir(tmp_path)
    log = {"every": 1, "validate_every": 2, "sample_every": 2, "best": "validation_loss", "trackers": []}
    Path("short.yaml").write_text(yaml.safe_dump({**SETTINGS, "train": TINY["train"], "log": log}))

    def train(*flags):
        TRAIN.main(parse_run(ExperimentConfig, ["--config", "short.yaml", "--name", *flags]))

    def signalled(self, step):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    train("straight")
    monkeypatch.setattr(Inspections, "validate", signalled)
    with pytest.raises(SystemExit) as ended:
        train("stopped")
    assert ended.value.code == 75
    stopped = Path("runs/stopped")
    assert (
        stopped / "stopped"
    ).read_text() == "SIGTERM: stopped after 2 of 4 steps; continue with --resume runs/stopped\n"
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["00000002"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train("stopped", "--resume", "auto")
    assert not (stopped / "stopped").exists()
    assert unmeasured(tmp_path, "stopped") == unmeasured(tmp_path, "straight")
    assert [path.name for path in sorted((stopped / "samples").iterdir())] == ["00000002.png", "00000004.png"]
    assert (stopped / "checkpoints/best").resolve() == (stopped / "checkpoints/00000004").resolve()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its launcher is gone")
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ([*ACCELERATE, "1"], signal.SIGUSR2),
        ([*ACCELERATE, "2"], signal.SIGUSR1),
        ([*TORCHRUN, "2"], signal.SIGTERM),
    ],
    ids=["accelerate, one process", "accelerate, two", "torchrun, two"],
)
def test_a_signalled_launchers_training_saves_and_says_that_it_stopped(tmp_path, launcher, number):
    process = begun(tmp_path, *launcher, *TRAINING, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=300) not in (0, 75)  # so that nobody goes by it
    assert not psutil.wait_procs(family, timeout=300)[1]
    run = tmp_path / "runs/long"
    stopped = (run / "stopped").read_text()
    assert stopped.endswith(f"of 100000 steps; continue with --resume {run.relative_to(tmp_path)}\n")
    assert (run / f"checkpoints/{stopped_after(stopped):08d}/ema.safetensors").is_file()
    with Lock(run / "training.lock"):
        pass


def test_a_slurm_job_refuses_to_resume_another_run(tmp_path):
    """Of two --resume flags the last one counts, which would start another run."""
    (tmp_path / "long.yaml").touch()
    launch, asked = script("scripts/launch_slurm.py"), ["--experiment", str(tmp_path / "long.yaml"), "--overrides"]
    for flags in (["--resume", "runs/other"], ["--resume=runs/other"]):
        with pytest.raises(ValueError, match="--overrides: --resume is always auto here"):
            parse(launch.LaunchConfig, [*asked, json.dumps(flags)])


def test_a_job_that_slurm_signals_is_requeued_and_goes_on(tmp_path):
    """SIGUSR2 goes to all processes of the job."""
    script = [str(ROOT / "scripts/launch_slurm.py"), "--experiment", "long.yaml", "--cluster", "local"]
    process = begun(tmp_path, *script, "--wait", "true", stdout=subprocess.PIPE, text=True)
    (controller,) = psutil.Process(process.pid).children()
    for each in controller.children(recursive=True):
        each.send_signal(signal.SIGUSR2)
    (said,) = (tmp_path / "runs/slurm").glob("*.out")
    while "Requeued" not in said.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    await_step(tmp_path, process, stopped_after(said.read_text()) + 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "it ended with status 75" in output
    first, second = (line for line in said.read_text().splitlines() if "stopped after" in line)
    assert first.startswith("SIGUSR")
    assert second.startswith("SIGTERM")
    assert [event["step"] for event in log(tmp_path, "long")] == list(range(1, stopped_after(second) + 1))


WAITS = """
import os, pathlib, signal, sys, time
received = []
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: received.append(number))
pathlib.Path("began" + os.environ["RANK"]).touch()
while signal.SIGUSR1 not in received:
    time.sleep(0.02)
pathlib.Path("run/stopped").touch()
sys.exit(75)
"""  # a program in the place of train.py


def test_the_launcher_of_a_slurm_job_outlives_the_signal_which_reaches_both_of_its_trainings(tmp_path, monkeypatch):
    """SIGUSR2, which goes to the launcher too, would kill it; what the job sends then is SIGUSR1."""
    launch = script("scripts/launch_slurm.py")
    (tmp_path / "train.py").write_text(WAITS)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in environment_of().items():
        monkeypatch.setenv(name, value)
    job = launch.Training(["--config", "long.yaml"], Path("run"), gpus=2)

    def end_of_time():
        while len(list(tmp_path.glob("began*"))) < 2:
            time.sleep(0.02)
        launcher = psutil.Process(job.process.pid)
        family = [launcher, *launcher.children(recursive=True)]
        for each in family:
            each.send_signal(signal.SIGUSR2)
        time.sleep(0.2)
        assert len(family) == 3
        assert all(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
        return job.checkpoint()

    with ThreadPoolExecutor(1) as pool:
        requeued = pool.submit(end_of_time)
        assert job() == 75
    again = requeued.result().function
    assert (again.arguments, again.run, again.gpus) == (job.arguments, job.run, 2)


def test_a_terminal_that_is_closed_loses_nothing(tmp_path):
    main, terminal = os.openpty()
    options = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}
    process = begun(tmp_path, "-c", ON_TERMINAL, *TRAINING, **options)
    os.close(terminal)
    os.close(main)
    process.wait(timeout=300)  # with whatever status: there is no shell left
    stopped = (tmp_path / "runs/long/stopped").read_text()
    assert stopped.startswith("SIGHUP: ")
    assert (tmp_path / f"runs/long/checkpoints/{stopped_after(stopped):08d}/ema.safetensors").is_file()


def recipe(starts_with):
    """Read a shell block of the documents."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/resuming.md").read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(starts_with))


def shell(folder, *lines):
    return subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("status", [0, 2])
def test_the_documented_shell_loop_restarts_only_after_exit_status_75(tmp_path, status):
    python = f"python() {{ echo >> calls; [ $(wc -l < calls) -lt 3 ] && return 75; return {status}; }}"
    shell(tmp_path, python, "sleep() { :; }", recipe("while python"))
    assert len((tmp_path / "calls").read_text()) == 3


def test_the_documented_job_waits_for_the_save_and_is_requeued(tmp_path):
    """The signal ends the launcher, whose training still runs and holds the lock."""
    (tmp_path / "runs/xswin").mkdir(parents=True)
    training = "touch began; until [ -e signalled ]; do sleep 0.05; done; sleep 0.3; echo SIGTERM > runs/xswin/stopped"
    launcher = f"accelerate() {{ exec flock runs/xswin/training.lock sh -c '{training}'; }}"
    scheduler = "(until [ -e began ]; do sleep 0.05; done; kill -USR1 $$; touch signalled) &"
    done = shell(tmp_path, launcher, "scontrol() { echo $1; }", scheduler, recipe("#!/bin/bash"))
    assert done.stdout == "requeue\n"
