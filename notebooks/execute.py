"""Runs quickstart.ipynb in a kernel and keeps its outputs, small: no messages of libraries, pictures once.

    pip install -c constraints.txt -e ".[train,notebook]"
    python notebooks/execute.py

On quiet cores: the notebook shows seconds. It writes nothing unless every cell that shows something has shown it. (The
tests only run its cells, and look at what is stored.)
"""

import ast
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"


def shows(source: str) -> set[str]:
    """What a cell puts below itself: "stream" by `print`, "execute_result" by an expression at its end."""
    body = ast.parse(source).body
    prints = [node for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Call) and _is_print(node)]
    ends = bool(body) and isinstance(body[-1], ast.Expr) and body[-1].value not in prints
    return ({"stream"} if prints else set()) | ({"execute_result"} if ends else set())


def _is_print(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "print"


def missing(notebook: dict[str, Any]) -> list[str]:
    """First lines of those cells whose output is not stored, or not all of it."""
    without = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            if not shows(source) <= {output["output_type"] for output in cell["outputs"]}:
                without.append(source.splitlines()[0])
    return without


def is_kept(output: dict[str, Any]) -> bool:
    return output.get("name") != "stderr"


def main() -> int:
    # Not at the top: the tests use the rules above without a kernel.
    import nbformat
    from nbclient import NotebookClient

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
    if without := missing(notebook):
        sys.stderr.write(f"Not written: no output of the cells that begin with {without}.\n")
        return 1
    nbformat.write(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
