"""Background work of a loop, and what a kill at any of its file operations leaves behind."""

import os
import sys
import threading
import time

import pytest

from machine.background import Background
from machine.checkpoint_folder import (
    checkpoint_path,
    find_damage,
    list_checkpoints,
    mark_best,
    newest_intact,
    rotate,
    write_checkpoint,
)

FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"}


def test_jobs_are_done_in_order_until_one_fails():
    done, gate = [], threading.Event()
    background = Background()
    background.start(lambda: gate.wait(60) and done.append(1))
    background.start(lambda: done.append(2))
    background.check()
    assert not done
    gate.set()
    background.wait()
    assert done == [1, 2]
    background.start(lambda: 1 / 0)
    background.start(lambda: done.append(3))
    with pytest.raises(ZeroDivisionError):
        background.wait()
    with pytest.raises(ZeroDivisionError):
        background.check()
    assert done == [1, 2]


@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
def test_leaving_the_loop_waits_for_the_background_job(error):
    done = []

    def loop():
        with Background() as background:
            background.start(lambda: time.sleep(0.2) or done.append(1))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            loop()
    else:
        loop()
    assert done == [1]


def test_a_second_ctrl_c_does_not_wait_for_background_work():
    gate, background = threading.Event(), Background()
    background.start(lambda: gate.wait(60))
    background.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # else it would wait for ever
    gate.set()
    background.wait()


def write(folder, step, text):
    def fill(checkpoint):
        (checkpoint / "state").mkdir()
        (checkpoint / "state" / "progress.json").write_text(text)

    write_checkpoint(checkpoint_path(folder, step), fill)


def saves(folder, step, text):
    """Save as a training does in the background, keeping one checkpoint."""
    with Background() as background:
        background.start(lambda: write(folder, step, text))
        background.start(lambda: rotate(folder, keep=1))
        background.start(lambda: mark_best(folder, step))


def killed_at(number, job):
    """Kill a process that does a job at a numbered file operation, counted from 0; returns whether it came that far."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        left = [number]

        def hook(event, arguments):
            if event in FILE_OPERATIONS:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1

        sys.addaudithook(hook)
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step again"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, step):
    found, number = set(), 0
    while True:
        folder = tmp_path / str(number) / "checkpoints"
        saves(folder, 1, "old")
        was_killed = killed_at(number, lambda folder=folder: saves(folder, step, "new"))
        newest = newest_intact(folder)
        assert newest is not None
        assert newest == list_checkpoints(folder)[-1]  # nothing damaged is taken for one
        found.add((newest / "state" / "progress.json").read_text())
        for later in (3, 4):  # of which rotation leaves the best until there is a better one
            saves(folder, later, "after")
        assert sorted(path.name for path in folder.iterdir()) == ["00000003", "00000004", "best"]
        assert find_damage(checkpoint_path(folder, 4)) is None
        if not was_killed:
            break
        number += 1
    assert number > 15
    assert found == {"old", "new"}
