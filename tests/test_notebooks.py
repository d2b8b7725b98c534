"""The tutorials run from top to bottom, show what they have to show, and are committed as they ran.

`python tests/test_notebooks.py` runs all of them, or those that are given, and writes what they show.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 300_000
# Of the machine that ran a notebook, and of what is no use to a reader.
JUNK = re.compile(r"/home/|/root/|/tmp/|/Users/|site-packages|Warning:|\d%\||it/s\]|<progress")

assert NOTEBOOKS, f"no notebooks in {FOLDER}"


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def execute(path, folder):
    """Runs a notebook in a folder, with the Python that runs this; an error in a cell is raised."""
    notebook = read(path)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False
    )
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    return client.execute()


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if "how_it_works" in path.stem else pytest.mark.slow) for path in NOTEBOOKS],
    ids=[path.stem for path in NOTEBOOKS],
)
def test_a_notebook_runs_without_an_error_and_shows_its_pictures(path, tmp_path, monkeypatch):
    # Nothing may come from the network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    expected = len(pictures(read(path)))
    assert expected, "a tutorial without a picture"
    notebook = execute(path, tmp_path)
    assert len(pictures(notebook)) == expected
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert path.stat().st_size <= MOST_BYTES
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for output in outputs(notebook):
        assert output.output_type != "error"
        shown = [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if "text" in kind)]
        for text in shown:
            assert not JUNK.search(text), text


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or NOTEBOOKS):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder)
        notebook.metadata = read(path).metadata
        nbformat.write(notebook, path)
        print(path)
