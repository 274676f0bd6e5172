"""Runs quickstart.ipynb in a kernel and keeps its outputs, small: no messages of libraries, pictures once.

    pip install -c constraints.txt -e ".[train]" nbclient ipykernel
    python notebooks/execute.py

On quiet cores: the notebook shows seconds. (The tests only run its cells, and write nothing.)
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"


def is_kept(output: nbformat.NotebookNode) -> bool:
    return output.get("name") != "stderr"


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # for what its cells write
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
