"""Shared set-up of all tests: their environment, order and distribution, checked signatures, common fixtures."""

import gc
import importlib
import os
import signal
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")  # no bf16: equal numbers on every machine
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # programs share their compiled files, even where the environment forbids it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with one worker per core, more threads would wait for each other
# Pin each worker, and the processes that it starts, to a core of its own.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import yaml
from browser import a_browser
from processes import ADDRESS, FORKS, ROOMS, ROOT, TINY, run, serve
from xdist.scheduler import LoadScopeScheduling

LONG = ("test_ablation", "test_train", "test_preemption", "test_devices", "test_evaluate", "test_notebook", "test_app")


@cache
def shares(path: str) -> bool:
    """Whether the tests of a file share a module-scoped fixture, such as a server or a program's output."""
    return 'scope="module"' in (ROOT / path).read_text()


class SharedTogether(LoadScopeScheduling):
    """Distributes tests one by one, but files with shared fixtures as a whole, so that one worker makes those."""

    def _split_scope(self, nodeid):
        path = nodeid.partition("::")[0]
        return path if shares(path) else nodeid


def pytest_configure(config):
    """One server for all workers, which starts while they collect; where a few tests are named, who needs one has one.
    From 3.14 on, Python's servers ask for a key too."""
    is_shared = FORKS and sys.version_info < (3, 14) and not worker and config.getoption("numprocesses")
    if is_shared and config.args_source is config.ArgsSource.TESTPATHS:
        os.environ[ADDRESS] = serve()


def pytest_xdist_make_scheduler(config, log):
    return SharedTogether(config, log)


def pytest_collection_modifyitems(items):
    """Run long tests first, so that the workers finish at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONG and not shares(item.nodeid.partition("::")[0]))


def pytest_collection(session):
    """Check shapes and types of signatures in everything imported from here on, but not in xdist's controller."""
    if worker or not session.config.getoption("numprocesses"):
        examples = importlib.import_module("hypothesis").settings
        examples.register_profile("same", deadline=None, derandomize=True)  # the same examples on any machine
        examples.load_profile("same")
        importlib.import_module("signatures").check(ROOMS)
    gc.disable()  # imports leave no garbage, so collections during collection only cost time


def pytest_collection_finish():
    gc.freeze()  # later collections skip the imported modules
    gc.enable()


# nohup and a shell's `&` start processes with signals ignored, which those of the tests would inherit.
for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def root() -> Path:
    """Root folder of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Change into a new, empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A working folder that holds a finished tiny run; each of pytest's workers makes its own."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run("train.py", "--config", "tiny.yaml", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A real browser for all tests of a module."""
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def colour_file(tmp_path_factory) -> Path:
    """An exported program as extractor, whose features tests compute themselves: the mean colour."""
    from mean_colour import PROBE, MeanColour

    from metrics.programs import save_program

    return save_program(MeanColour(), PROBE, tmp_path_factory.mktemp("extractors") / "mean_colour.pt")


@pytest.fixture(scope="session")
def colour(colour_file):
    """The extractor of `colour_file`."""
    from metrics.features import Extractor

    return Extractor(colour_file)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """File with random weights of Inception, as a state dict like the one that torch-fidelity downloads."""
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
