"""PEFT adapters inside a model."""

import contextlib
import os
import sys
from collections.abc import Iterator

from torch import nn

#: Name of the adapter that is active in denoising passes only.
DIDA_ADAPTER = "dida"


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold adapters, of whatever name, or did."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # without it there are none
    return [] if peft is None else _instances(model, peft.BaseTunerLayer)


def _instances(module: nn.Module, kind: type) -> list[nn.Module]:
    """`module`, or those below it; none lies inside another, and looking there takes most of the time."""
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in _instances(child, kind)]


def load_lora(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default"):
    """Loads a PEFT adapter, which is active in all passes from now on, in place of others.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name (`str`): for `model.set_adapter`.
    Raises:
        ValueError: for a name that is taken, and for an adapter of another model.
    """
    if adapter_name == DIDA_ADAPTER:
        raise ValueError(f"`adapter_name`={DIDA_ADAPTER!r} is that of DiDA adapters. Use `load_dida_adapter`.")
    try:
        found = model.load_adapter(str(folder), adapter_name=adapter_name)
    except RuntimeError as error:  # tensors of other shapes
        delete_adapters(model, [adapter_name])
        raise ValueError(f"the adapter in {folder} does not fit this model: {error}") from error
    # transformers also misses the tensors of other adapters.
    wrong = [name for name in found.missing_keys if f".{adapter_name}." in name] + sorted(found.unexpected_keys)
    if wrong:
        delete_adapters(model, [adapter_name])
        raise ValueError(f"the adapter in {folder} does not fit this model: {len(wrong)} tensors, like {wrong[0]}.")


def delete_adapters(model: nn.Module, names: list[str]):
    """Removes adapters; none of the others becomes active in all passes."""
    model.delete_adapter(names)
    for layer in adapter_layers(model):
        # PEFT makes another adapter active instead, but DiDA's must be so in denoising passes only.
        layer._active_adapter = [name for name in layer.active_adapters if name != DIDA_ADAPTER]


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
