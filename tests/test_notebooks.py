"""Every notebook runs from top to bottom and is stored with the outputs of a run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from peft_heads.benchmark.offline.evidence import read_records
from peft_heads.benchmark.offline.evidence_tables import evidence_tables
from peft_heads.benchmark.report.tables import to_markdown


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SLOW = {"02_small_adapters", "03_does_it_work"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in NOTEBOOKS],
)
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

    folder = {"metadata": {"path": str(path.parent)}}  # as in Jupyter
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    expected = {"03_does_it_work": "1140 trainings of 38 settings on 6 tasks"}
    printed = "".join(map(text_of, code))
    assert expected.get(path.stem, "the reloaded model gives identical logits: True") in printed


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_stored_tables_are_those_of_the_runs():
    """The tables of notebook 3 are computed from the file beside it."""
    folder = NOTEBOOKS[0].parent
    notebook = nbformat.read(folder / "03_does_it_work.ipynb", as_version=4)
    shown = [o["data"].get("text/markdown", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    for table in evidence_tables(read_records(folder / "03_runs.csv")).values():
        assert to_markdown(table) in shown, table.title


def test_there_are_notebooks():
    assert NOTEBOOKS
