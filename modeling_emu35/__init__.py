"""Emu3.5, native to Hugging Face.  Importing this package registers its classes with the Auto* factories."""

from importlib.resources import files

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
)

from .configuration_emu35 import Emu35Config, Emu35TextConfig, Emu35TokenLayout, Emu35VisionTokenizerConfig
from .generation_configuration_emu35 import Emu35GenerateOutput, Emu35GenerationConfig
from .modeling_emu35 import Emu35ForConditionalGeneration, Emu35Model
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

#: Path of the tiny checkpoint that is shipped with the package.
TINY = str(files("emu35.model_cards") / "emu35-tiny")

for _config in (Emu35Config, Emu35TextConfig, Emu35VisionTokenizerConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(Emu35Config, Emu35Model, exist_ok=True)
AutoModel.register(Emu35VisionTokenizerConfig, Emu35VisionTokenizer, exist_ok=True)
AutoModelForMultimodalLM.register(Emu35Config, Emu35ForConditionalGeneration, exist_ok=True)

__all__ = [
    "TINY",
    "Emu35Config",
    "Emu35ForConditionalGeneration",
    "Emu35GenerateOutput",
    "Emu35GenerationConfig",
    "Emu35Model",
    "Emu35TextConfig",
    "Emu35TokenLayout",
    "Emu35VisionTokenizer",
    "Emu35VisionTokenizerConfig",
]
