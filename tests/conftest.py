"""What all tests share: the order they come in, checked signatures, folders."""

import gc
import importlib
import os
import signal
from functools import cache
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")  # no bf16: the same numbers on every machine
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # what programs compile is kept for the next, also where this forbids it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core: threads of two would wait for each other
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):  # and so for what it starts
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import yaml
from browser import a_browser
from processes import ROOMS, ROOT, TINY, run
from xdist.scheduler import LoadScopeScheduling

LONG = ("test_ablation", "test_train", "test_preemption", "test_devices", "test_evaluate", "test_notebook", "test_app")


@cache
def shares(path: str) -> bool:
    """Whether the tests of a file share what they look at: a server, a program's output."""
    return 'scope="module"' in (ROOT / path).read_text()


class SharedTogether(LoadScopeScheduling):
    """Deals out test by test, but files that share something to one worker, which alone makes it."""

    def _split_scope(self, nodeid):
        path = nodeid.partition("::")[0]
        return path if shares(path) else nodeid


def pytest_xdist_make_scheduler(config, log):
    return SharedTogether(config, log)


def pytest_collection_modifyitems(items):
    """What takes long comes first: what runs last is short, and no worker waits for another."""
    items.sort(key=lambda item: item.path.stem not in LONG and not shares(item.nodeid.partition("::")[0]))


def pytest_collection(session):
    """Shapes and types of signatures are checked from here on; not in the process that deals out tests."""
    if worker or not session.config.getoption("numprocesses"):
        examples = importlib.import_module("hypothesis").settings
        examples.register_profile("same", deadline=None, derandomize=True)  # the same on any machine
        examples.load_profile("same")
        importlib.import_module("signatures").check(ROOMS)
    gc.disable()  # nothing that is imported goes


def pytest_collection_finish():
    gc.freeze()  # nor is looked through from here on
    gc.enable()


for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):  # nohup and a shell's & pass on their deafness
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A fresh working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A working folder with a finished tiny run in it, made by each of pytest's workers for itself."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run("train.py", "--config", "tiny.yaml", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A real one, for all tests of a module."""
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def colour_file(tmp_path_factory) -> Path:
    """A program whose features are known without it."""
    from mean_colour import PROBE, MeanColour

    from metrics.programs import save_program

    return save_program(MeanColour(), PROBE, tmp_path_factory.mktemp("extractors") / "mean_colour.pt")


@pytest.fixture(scope="session")
def colour(colour_file):
    """The same as an extractor."""
    from metrics.features import Extractor

    return Extractor(colour_file)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """Random weights of Inception in the format that torch-fidelity downloads: a state dict."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Unloaded("random", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(module.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"
