"""The notebook runs from its first cell to its last, on a tiny budget."""

import asyncio
import json
import sys

import nbformat
import pytest
import yaml
from processes import PIXELS, ROOT, environment_of

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of jupyter_client and zmq, in this process
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_quickstart_trains_samples_and_scores(tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Kernel(AsyncKernelManager):
        """A kernel that runs this interpreter, whatever kernels are installed."""

        @property
        def kernel_spec(self):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, language="python", display_name="Python 3")

    (tmp_path / "pixels.yaml").write_text(yaml.safe_dump(PIXELS))
    tiny = {"CONFIG": tmp_path / "pixels.yaml", "FOLDER": tmp_path, "PER_CLASS": 2}
    for name, value in environment_of(**{f"QUICKSTART_{name}": str(value) for name, value in tiny.items()}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook, timeout=280, resources={"metadata": {"path": str(ROOT / "docs")}}, kernel_manager_class=Kernel
    )
    asyncio.run(client.async_execute())

    run = tmp_path / "runs" / "notebook"
    scores = json.loads((run / "samples-scores.json").read_text())
    assert scores["scores"]["frechet_distance[classifier]"]["value"] > 0
    for name in ("loss.png", "samples.png", "python.png", "samples.npz", "classifier.pt"):
        assert (run / name).is_file(), name
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "error:" not in printed
    assert (
        sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])) == 3
    )


def test_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) <= 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
