"""ZeroGPU: a GPU that Hugging Face lends for the length of a call.

Such a call runs in a process of its own, which the package `spaces` forks. That package has to be imported before the
GPU is touched. Our own package has the name `emu35.spaces`, but started from the folder above it, Python would find
our folder under the name `spaces`.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def _is_installed() -> bool:
    spec = find_spec("spaces")
    ours = Path(__file__).resolve().parent
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent != ours


_spaces = import_module("spaces") if _is_installed() else None
#: Whether calls have to be decorated: elsewhere the decorator is installed at most, and does nothing.
IS_ZERO_GPU = _spaces is not None and bool(os.environ.get("SPACES_ZERO_GPU"))


def on_gpu(function: Callable, seconds: float) -> Callable:
    """The function, run where the GPU is.  Its arguments and what it yields are pickled on the way."""
    return _spaces.GPU(function, duration=seconds) if IS_ZERO_GPU else function


__all__ = ["IS_ZERO_GPU", "on_gpu"]
