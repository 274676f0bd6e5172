"""notebooks/quickstart.ipynb, its code cells run from top to bottom in one namespace, as a kernel would."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
MOST_BYTES = 300_000
_spec = importlib.util.spec_from_file_location("execute", NOTEBOOK.with_name("execute.py"))
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def sources(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMU35_LORA_STEPS", "2")
    scope = {"__name__": "__main__"}
    for number, source in enumerate(sources(notebook)):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), scope)
    assert scope["answers"]["what color is the square?"] == "green"
    assert len(scope["story"].images) == 3 and set(scope["race"]) >= {"ar", "speculative", "dida, 8 steps"}
    assert (scope["adapter"] / "adapter_model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "36 passes" in said and "9 passes" in said and "2 steps in" in said
    assert scope["show"](scope["image"], scope["edited"], side=10).size == (24, 10)


def test_it_is_ready_for_colab(notebook):
    first, rest = sources(notebook)[0], sources(notebook)[1:]
    assert '"pip", "install"' in first and "emu35[train]" in first
    assert all("pip" not in source for source in rest)
    for source in sources(notebook):  # plain Python: no magic, which the test above could not run
        assert not any(line.startswith(("%", "!")) for line in source.splitlines())


def test_its_outputs_are_there_and_small(notebook):
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in outputs for output in cell if "image/png" in output.get("data", {})]
    assert len(pictures) == 5  # pictures, edit, story, decoders, before and after LoRA
    kinds = {output["output_type"] for cell in outputs for output in cell}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert not any(output.get("name") == "stderr" for cell in outputs for output in cell)
    assert execute.missing(notebook) == [], "run: python notebooks/execute.py"
    said = "".join("".join(output.get("text", ())) for cell in outputs for output in cell)
    assert len(re.findall(r"\d\.\d{3} s, \d+ passes", said)) == 4 and re.search(r"\d+ steps in \d+ s", said)


def test_outputs_that_are_not_there_are_found(notebook):
    assert execute.shows("print(1)\n2") == {"stream", "execute_result"}
    assert execute.shows("def f():\n    return 1") == set() and execute.shows("x = 1\nprint(x)") == {"stream"}
    without = copy.deepcopy(notebook)
    cells = [cell for cell in without["cells"] if cell["cell_type"] == "code" and cell["outputs"]]
    cells[-1]["outputs"] = []
    assert execute.missing(without) == ["".join(cells[-1]["source"]).splitlines()[0]]
