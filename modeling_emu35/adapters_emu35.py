"""PEFT adapters inside a model."""

import contextlib
import sys
from collections.abc import Iterator

from torch import nn


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold adapters, of whatever name, or did."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # without it there are none
    return [] if peft is None else [module for module in model.modules() if isinstance(module, peft.BaseTunerLayer)]


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as it was before adapters were loaded, so that saving it saves its weights.

    With adapters, transformers saves those alone.

    Raises:
        ValueError: if adapters are merged into the weights.
    """
    adapted = set(adapter_layers(model))
    layers = [(name, module) for name, module in model.named_modules() if module in adapted]
    merged = sorted({one for _, layer in layers for one in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged into the weights. Unmerge them before saving.")
    # The second one is left by `load_adapter`: saving would give the model's tensors the names of an adapter's.
    state = {name: getattr(model, name, None) for name in ("_hf_peft_config_loaded", "_weight_conversions")}
    try:
        for name, layer in layers:
            model.set_submodule(name, layer.get_base_layer())
        model._hf_peft_config_loaded, model._weight_conversions = False, None
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)
        for name, value in state.items():
            setattr(model, name, value)
