"""`from_pretrained` for this project's checkpoints and for the release's own."""

from pathlib import Path

from transformers import PreTrainedConfig

from .configuration_emu35 import is_released_config
from .generation_configuration_emu35 import Emu35GenerationConfig
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer


class ReleasedCheckpointMixin:
    """Loads strictly, from safetensors only, and knows the release's layout."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        vision_tokenizer: "str | Path | Emu35VisionTokenizer | None" = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """[`~transformers.PreTrainedModel.from_pretrained`], with these differences.

        Args:
            pretrained_model_name_or_path:
                a checkpoint of this project, or of the release (`model_type` "Emu3"; no vision tokenizer in it).
            vision_tokenizer (`str`, `Path` or `Emu35VisionTokenizer`, *optional*):
                a vision tokenizer, or its directory (ours or the release's), for a checkpoint that has none.
        Raises:
            ValueError: if the checkpoint lacks tensors of the model or has others (nothing is initialised at random).
        """
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("dtype", "auto")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        for problem, names in (
            ("lacks", info["missing_keys"]),
            ("has unknown", info["unexpected_keys"]),
            ("has misshapen", info["mismatched_keys"]),
        ):
            if names:
                listed = ", ".join(sorted(map(str, names))[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(
                    f"the checkpoint {pretrained_model_name_or_path} {problem} tensors: {listed}. Its `config.json` and "
                    "weights don't belong together, or the download is incomplete."
                )
        config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path)
        if is_released_config(config_dict) and kwargs.get("generation_config") is None:
            model.generation_config = Emu35GenerationConfig.released()
        if vision_tokenizer is not None:
            model.attach_vision_tokenizer(vision_tokenizer)
        return (model, info) if output_loading_info else model

    def attach_vision_tokenizer(self, vision_tokenizer: "str | Path | Emu35VisionTokenizer") -> None:
        """Gives the model a vision tokenizer, in float32 on the model's device."""
        if not isinstance(vision_tokenizer, Emu35VisionTokenizer):
            vision_tokenizer = Emu35VisionTokenizer.from_pretrained(vision_tokenizer)
        if vision_tokenizer.config.codebook_size > self.config.token_layout.num_visual_tokens:
            raise ValueError(
                f"`vision_tokenizer` has {vision_tokenizer.config.codebook_size} codes, but the vocabulary has only "
                f"{self.config.token_layout.num_visual_tokens} visual tokens. They don't belong together."
            )
        self.vision_tokenizer = vision_tokenizer.float().eval().to(self.get_input_embeddings().weight.device)
        self.config.vision_tokenizer_config = vision_tokenizer.config
