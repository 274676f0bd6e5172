"""Emu3.5, native to Hugging Face.  Importing this package registers its classes with the Auto* factories."""

from importlib.resources import files

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from .configuration_emu35 import Emu35Config, Emu35TextConfig, Emu35TokenLayout, Emu35VisionTokenizerConfig
from .generation_configuration_emu35 import Emu35GenerateOutput, Emu35GenerationConfig
from .image_processing_emu35 import Emu35ImageProcessor, smart_resize
from .modeling_emu35 import Emu35ForConditionalGeneration, Emu35Model
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from .processing_emu35 import Emu35Processor
from .protobuf_emu35 import Story, load_story
from .segments_emu35 import GlobalThought, Image, ImageThought, Segments, Text
from .streaming_emu35 import (
    Emu35Streamer,
    End,
    ImageFinished,
    ImageProgress,
    ImageStarted,
    TextPiece,
    ThoughtPiece,
)

#: Path of the tiny checkpoint that is shipped with the package.
TINY = str(files("emu35.model_cards") / "emu35-tiny")
#: Path of its adapter for `image_decoder="dida"`.
TINY_DIDA = str(files("emu35.model_cards") / "emu35-tiny-dida")

for _config in (Emu35Config, Emu35TextConfig, Emu35VisionTokenizerConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(Emu35Config, Emu35Model, exist_ok=True)
AutoModel.register(Emu35VisionTokenizerConfig, Emu35VisionTokenizer, exist_ok=True)
# The release resizes with PIL; torchvision's bicubic differs, so it is no second backend.
AutoImageProcessor.register(
    Emu35Config,
    image_processor_classes={"pil": Emu35ImageProcessor, "torchvision": Emu35ImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(Emu35Config, Emu35Processor, exist_ok=True)
AutoModelForMultimodalLM.register(Emu35Config, Emu35ForConditionalGeneration, exist_ok=True)

__all__ = [
    "TINY",
    "TINY_DIDA",
    "Emu35Config",
    "Emu35ForConditionalGeneration",
    "Emu35GenerateOutput",
    "Emu35GenerationConfig",
    "Emu35ImageProcessor",
    "Emu35Model",
    "Emu35Processor",
    "Emu35Streamer",
    "Emu35TextConfig",
    "Emu35TokenLayout",
    "Emu35VisionTokenizer",
    "Emu35VisionTokenizerConfig",
    "End",
    "GlobalThought",
    "Image",
    "ImageFinished",
    "ImageProgress",
    "ImageStarted",
    "ImageThought",
    "Segments",
    "Story",
    "Text",
    "TextPiece",
    "ThoughtPiece",
    "load_story",
    "smart_resize",
]
