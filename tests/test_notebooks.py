"""Every notebook runs from top to bottom and is stored with the outputs of a run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# jupyter_client and zmq leave sockets and event loops to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:]), "stored without outputs"  # the first cell imports
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    stored = "".join(map(text_of, code))
    assert not [place for place in ("/tmp/", "/home/", "site-packages") if place in stored], (
        "names a machine's folders"
    )

    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert "the reloaded model gives identical logits: True" in "".join(map(text_of, code))


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_there_are_notebooks():
    assert NOTEBOOKS
