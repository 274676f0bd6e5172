"""ZeroGPU, by a package of its name that only notes what it is asked for."""

import importlib.util
import sys

import pytest
from emu35.spaces import zero_gpu

FAKE = """
asked = []

def GPU(function, duration):
    asked.append(duration)
    def decorated(*values):
        yield "elsewhere"
        yield from function(*values)
    return decorated
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module()`: our module as it is imported where there is a package `spaces`."""
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "spaces"]:
        monkeypatch.delitem(sys.modules, name)

    def load():
        spec = importlib.util.spec_from_file_location("another_zero_gpu", zero_gpu.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("spaces", None)


def test_calls_are_decorated_on_zero_gpu(module, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    found = module()
    assert found.IS_ZERO_GPU
    assert list(found.on_gpu(range, 120)(2)) == ["elsewhere", 0, 1]
    assert sys.modules["spaces"].asked == [120]


def test_elsewhere_they_are_not(module, monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    found = module()
    assert not found.IS_ZERO_GPU
    assert found.on_gpu(range, 120) is range


@pytest.mark.parametrize(("model", "seconds"), [(None, 67), ("emu35-image", 120)])
def test_a_request_asks_for_no_more_than_is_given(monkeypatch, model, seconds):
    from emu35.spaces import engine
    from emu35.spaces.settings import SpaceSettings

    asked = []
    monkeypatch.setattr(engine, "on_gpu", lambda function, seconds: asked.append(seconds) or function)
    engine.Engine(SpaceSettings.for_model(model) if model else SpaceSettings.for_model())
    assert asked == [seconds]
