"""Whatever ends a program, the processes that it started end with it."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest
import yaml
from processes import PIXELS, ROOT, TINY, environment_of, run, script, started

from experiment.inputs import check_inputs
from machine import children
from machine.lock import Lock

PARENT = """
import signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from machine import children
{body}
"""
CHILD = """
import signal, sys, time

def end(number, frame):
    open("ended", "w").write(signal.Signals(number).name)
    sys.exit(75)

for each in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, end)
open("began", "w").close()
while True:
    time.sleep(0.01)
"""


def parent(folder, body, **options):
    """Start a program that starts CHILD, and wait until that has begun."""
    (folder / "child.py").write_text(CHILD)
    command = [sys.executable, "-c", PARENT.format(root=str(ROOT), body=body)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, **options)
    await_file(folder / "began", process)
    return process


def await_file(path, process, *, seconds=600):
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline
        time.sleep(0.05)


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def left(processes, seconds=120):
    return psutil.wait_procs(processes, timeout=seconds)[1]


def launches(script):
    """Whether an entry point that torch or accelerate installs is a launcher of programs."""
    of_accelerate = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")
    return script.module in ("torch.distributed.run", *of_accelerate)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_killed_parents_child_is_asked_to_end(tmp_path):
    process = parent(tmp_path, "children.start_process([sys.executable, 'child.py']).wait()")
    found = family(process)
    process.kill()
    process.communicate()
    assert not left(found)
    assert (tmp_path / "ended").read_text() == "SIGTERM"


def test_a_signal_handler_awaits_the_child_that_was_being_waited_for(tmp_path):
    body = """
def stop(number):
    children.send_signal(child, signal.SIGUSR1)
    children.wait_in_handler(child)
    print("ended in time")

child = children.start_process([sys.executable, "child.py"])
with children.handling_signals(stop):
    print(child.wait())
"""
    process = parent(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == "ended in time\n75\n"


def test_what_is_ignored_stays_ignored_and_grandchildren_can_be_killed(tmp_path):
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
script = "import subprocess, sys; subprocess.run([sys.executable, 'child.py'])"
child = children.start_process([sys.executable, "-c", script])
with children.handling_signals(lambda number: children.kill_tree(child)):
    print(child.wait())
"""
    process = parent(tmp_path, body)
    found = family(process)
    assert len(found) == 2
    process.send_signal(signal.SIGHUP)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[0] == f"{-signal.SIGKILL}\n"
    assert not left(found)
    assert not (tmp_path / "ended").exists()


@pytest.mark.parametrize("name", [each.name for each in entry_points(group="console_scripts") if launches(each)])
def test_every_command_that_launches_is_known_for_one(name):
    command = ["python", "-X", "faulthandler", "-u", f"/usr/bin/{name}"]
    assert children._launches(types.SimpleNamespace(cmdline=lambda: command))
    module = next(each.module for each in entry_points(group="console_scripts") if each.name == name)
    assert children._launches(types.SimpleNamespace(cmdline=lambda: ["python", "-X", "dev", "-u", "-m", module]))


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_signals_go_to_the_launched_process_and_not_to_its_launcher(tmp_path, launcher):
    (tmp_path / launcher).write_text("import subprocess, sys; subprocess.run([sys.executable, 'child.py'])")
    body = f"""
child = children.start_process([sys.executable, {launcher!r}], stderr=subprocess.DEVNULL)
with children.handling_signals(lambda number: children.send_signal(child, number)):
    child.wait()
"""
    process = parent(tmp_path, body)
    found = family(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not left(found)
    assert (tmp_path / "ended").read_text() == "SIGTERM"


def started_demo(folder):
    config = {**PIXELS, "train": {**TINY["train"], "num_steps": 100000}}
    config |= {"log": {"every": 1, "validate_every": 0, "trackers": []}}
    (folder / "long.yaml").write_text(yaml.safe_dump(config))
    command = [str(ROOT / "scripts/demo.py"), "--experiment", "long.yaml", "--folder", "demo"]
    process = started(command, folder, environment_of(FORKS="true"), folder / "output", folder / "errors")
    log, deadline = folder / "demo/runs/quickstart/log.jsonl", time.time() + 600
    while not log.exists() or not log.stat().st_size:
        assert process.is_alive(), (folder / "errors").read_text()
        assert time.time() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("number", "stop", "status"),
    [(signal.SIGTERM, os.kill, 143), (signal.SIGINT, os.killpg, 130)],
    ids=["SIGTERM to it alone", "Ctrl-C to its group"],
)
def test_a_stopped_demo_saves_and_says_how_to_go_on(tmp_path, number, stop, status):
    process = started_demo(tmp_path)
    (training,) = family(process)
    stop(process.pid, number)
    process.join(120)
    assert process.exitcode == status
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert not left([training])
    (checkpoint,) = (tmp_path / "demo/runs/quickstart/checkpoints").glob("[0-9]*")
    assert (checkpoint / "ema.safetensors").is_file()
    resume = f"{sys.executable} {ROOT / 'train.py'} --resume runs/quickstart"
    said = (tmp_path / "output").read_text().splitlines()
    assert said[-1] == f"stopped; continue with: cd {tmp_path / 'demo'} && {resume}"


@pytest.mark.parametrize("mistake", ["a typo", "a training goes on there"])
def test_a_demo_that_cannot_begin_deletes_nothing(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "runs/quickstart/checkpoints/00000500/ema.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    demo = script("scripts/demo.py")
    path, words, begin = "tiny.yaml", "in use by process", demo.main
    if mistake == "a typo":
        path, words, begin = "tniy.yaml", "no such file", check_inputs  # before `main`
    with Lock(tmp_path / "runs/quickstart/training.lock"), pytest.raises(ValueError, match=words):
        begin(demo.DemoConfig(tmp_path / path, tmp_path))
    assert weights.is_file()


def test_a_demo_deletes_what_a_demo_made_and_keeps_the_users_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = script("scripts/demo.py")
    run, kept = (
        Path("runs/quickstart"),
        lambda: sorted(path.name for path in Path("runs").glob("*.before-*/checkpoints/*")),
    )

    class Drawn(Exception):
        pass

    def launch(program, *_):
        if program != "train.py":
            raise Drawn
        (run / "checkpoints/00000500").mkdir(parents=True)
        (run / "checkpoints/00000500/checksums.json").write_text("of the demo")

    def begin():
        with pytest.raises(Drawn):
            demo.main(demo.DemoConfig(tmp_path / "tiny.yaml", tmp_path))
        assert [path.name for path in run.glob("checkpoints/*")] == ["00000500"]

    monkeypatch.setattr(demo, "launch", launch)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (run / "checkpoints/00000400").mkdir(parents=True)  # the user's
    begin()
    assert kept() == ["00000400"]
    begin()  # on what a demo has made
    assert kept() == ["00000400"]
    (run / "checkpoints/00000900").mkdir()  # the demo's, that the user has gone on with
    begin()
    assert kept() == ["00000400", "00000500", "00000900"]
    (run / "checkpoints/00000500/checksums.json").write_text("of a training of as many steps, begun anew")
    begin()
    assert kept() == ["00000400", "00000500", "00000500", "00000900"]


def test_the_demos_help_is_help(tmp_path):
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    done = run("scripts/demo.py", "--folder", tmp_path, "--help", cwd=tmp_path)
    assert "folder of runs/ and cache/" in done.stdout
    assert (tmp_path / "runs/quickstart").is_dir()


def test_a_stop_ends_the_program_that_is_run_too():
    def stop():
        while not (found := set(psutil.Process().children()) - before):
            time.sleep(0.02)
        started.extend(found)
        os.kill(os.getpid(), signal.SIGTERM)

    before, started = set(psutil.Process().children()), []
    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit, match="143"):
        children.run_process([sys.executable, "-c", "import time; time.sleep(600)"])
    assert not any(child.is_running() for child in started)
    with pytest.raises(SystemExit, match="3"):
        children.run_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_program_may_save_at_a_stop_and_a_second_one_ends_it(tmp_path):
    script = "import pathlib, signal, time; touch = lambda name: pathlib.Path(name).touch()\n"
    script += "signal.signal(signal.SIGTERM, lambda *_: touch('saved')); touch('began')\nwhile True: time.sleep(0.1)"

    def stop_twice():
        for name in ("began", "saved"):
            while not (tmp_path / name).exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_twice).start()
    with pytest.raises(children.EndedBySignal, match="143"):
        children.run_process([sys.executable, "-c", script], cwd=tmp_path)
