"""Threads of a CPU run: how many there are, and how they wait, depending on other processes on the cores."""

import os
import subprocess
import sys

import pytest
from processes import ROOT

import machine.threads

PROGRAM = """
import os, sys
sys.path.insert(0, "{root}")
os.sched_setaffinity(0, {cores})
import torch
{body}
"""


def python(body, cores=None, **environment):
    """Output of a program that may use all cores, or the given ones."""
    cores = set(range(os.cpu_count())) if cores is None else cores
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    program = PROGRAM.format(root=str(ROOT), cores=cores, body=body)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


on_linux = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="Linux, and two cores to share"
)

WAITING = """
import subprocess, time
from machine.threads import AdaptiveWaiting
torch.set_num_threads(2)
waiting = AdaptiveWaiting()
a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
alone = a @ a
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]

def until(sleeps):
    for _ in range(600):
        time.sleep(0.1)
        waiting.update()
        if waiting.sleeps == sleeps:
            return True

num_before = len(os.listdir("/proc/self/task"))
print(until(True), waiting)
print(len(os.listdir("/proc/self/task")) - num_before, torch.equal(a @ a, alone))
for other in others:
    other.kill()
    other.wait()
"""


@on_linux
def test_threads_sleep_on_a_busy_machine_without_changing_results():
    chosen, effect = python(WAITING, cores={0, 1})
    assert chosen.startswith("True 2 threads that sleep while they wait (others keep ")
    assert chosen.endswith(" of 2 cores busy)")
    assert effect == "2 True"  # a thread that holds the idle team, and its second member


class Machine:
    """Simulated clocks of two cores."""

    def __init__(self, monkeypatch):
        self.busy = self.own = self.now = 0.0
        monkeypatch.setattr(machine.threads.AdaptiveWaiting, "_times", lambda _: (self.busy, self.own, self.now))
        monkeypatch.setattr(machine.threads, "allowed_cores", lambda: [0, 1])
        monkeypatch.setattr("torch.get_num_threads", lambda: 2)
        self.waiting = machine.threads.AdaptiveWaiting()

    def second(self, own, others):
        self.now, self.own, self.busy = self.now + 1, self.own + own, self.busy + own + others
        self.waiting.update()
        return self.waiting.sleeps


def test_waiting_threads_follow_the_load_of_others_and_not_a_quiet_moment(monkeypatch):
    machine = Machine(monkeypatch)
    assert not machine.second(own=2.0, others=0.05)
    assert machine.second(own=1.2, others=0.8)
    assert machine.second(own=2.0, others=0.0)
    assert machine.second(own=1.5, others=0.5)
    assert [machine.second(own=2.0, others=0.0) for _ in range(3)] == [True, True, False]
    assert not machine.waiting._teams


def told(monkeypatch, threads, cores):
    """The message about this many threads on these cores."""
    monkeypatch.setattr(machine.threads, "allowed_cores", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    return machine.threads.adapt_waiting(print)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_set_stands(monkeypatch, name):
    value = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}[name]
    monkeypatch.setenv(name, value)
    assert told(monkeypatch, 2, [0, 1]) == f"2 threads that wait as {name}={value} says"


@on_linux
def test_more_threads_than_cores_sleep_while_they_wait(monkeypatch):
    said = told(monkeypatch, 2, [0])
    assert said == "2 threads that sleep while they wait (more of them than cores)"


DEAL = "from machine.threads import divide_cores; divide_cores(1); print(torch.get_num_threads())"


@on_linux
@pytest.mark.parametrize(("person", "expected"), [("", "2"), ("OMP_NUM_THREADS=1", "1")])
def test_a_launchers_single_thread_is_replaced_but_not_a_users_choice(person, expected):
    program = PROGRAM.format(root=str(ROOT), cores={0, 1}, body=DEAL)
    launcher = f"OMP_NUM_THREADS=1 ACCELERATE_MIXED_PRECISION=no {sys.executable} -c '{program}'; true"
    command = ["env", "-u", "OMP_NUM_THREADS", *person.split(), "sh", "-c", launcher]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [expected]


def test_threads_that_a_person_asked_for_are_told_without_a_launcher(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert not machine.threads._is_thread_count_set()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.threads._is_thread_count_set()
