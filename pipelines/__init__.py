"""Emu3.5 in diffusers: a pipeline, its output, and the scheduler of DiDA."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline_emu35 import Emu35Pipeline
    from .pipeline_output import Emu35PipelineOutput
    from .scheduling_dida import DiDAScheduler

__all__ = ["DiDAScheduler", "Emu35Pipeline", "Emu35PipelineOutput"]

_HOMES = {
    "DiDAScheduler": "scheduling_dida",
    "Emu35Pipeline": "pipeline_emu35",
    "Emu35PipelineOutput": "pipeline_output",
}


def __getattr__(name: str):
    # Lazily: diffusers' pipelines take a second to import, which `generate` alone need not pay for the scheduler.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
