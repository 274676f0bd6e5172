"""Configurations of Emu3.5: text decoder, vision tokenizer, their composite, and the token layout.

[`Emu35TokenLayout`] is the only home of token ids; [`SPECIAL_TOKENS`] the only home of the token strings behind them.
"""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

#: Role in the layout -> token string of the released vocabulary (`emu3_vision_tokens.txt` and the tiktoken specials).
SPECIAL_TOKENS: dict[str, str] = {
    "pad": "<|endoftext|>",
    "image_placeholder": "<|extra_0|>",
    "boc": "<|extra_50|>",
    "eoc": "<|extra_51|>",
    "bog": "<|extra_60|>",
    "eog": "<|extra_61|>",
    "bss": "<|extra_100|>",
    "ess": "<|extra_101|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "tms": "<|extra_202|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
}


@strict
class Emu35TokenLayout(PreTrainedConfig):
    r"""
    Which id means what.  Defaults: the released vocabulary of 282,926 tokens.

    A special id may be `None` when a vocabulary does not have that token.  An image of `h x w` codes is written
    `BOI, digits of h, "*", digits of w, IMG, row 0, EOL, row 1, EOL, ..., row h-1, EOI`.

    Args:
        boc_token_id, eoc_token_id (`int`): begin and end of an image's own chain of thought.
        bog_token_id, eog_token_id (`int`): begin and end of the global chain of thought.
        bss_token_id, ess_token_id (`int`): begin and end of the assistant's segment.
        eol_token_id (`int`): end of one row of visual tokens.
        eof_token_id, tms_token_id (`int`): end of frame and time stamp (reserved by the release).
        img_token_id (`int`): the size is complete, visual tokens follow.
        boi_token_id, eoi_token_id (`int`): begin and end of an image.
        image_placeholder_token_id (`int`):
            stands for one visual token until `model.resolve_image_tokens` has encoded the image.
        visual_token_offset (`int`): id of visual code 0.
        num_visual_tokens (`int`): number of visual ids; code `c` has the id `visual_token_offset + c`.
        digit_token_ids (`list[int]`): ids of the text tokens "0".."9".
        size_separator_token_id (`int`): id of the text token "*" between height and width.
        size_digits (`list[int]`):
            smallest and largest number of digits of each side when *the model* chooses a size. Given sizes may have
            any.
    """

    model_type = "emu35_token_layout"
    base_config_key = "token_layout"

    pad_token_id: int | None = 151643
    image_placeholder_token_id: int | None = 151646
    boc_token_id: int | None = 151696
    eoc_token_id: int | None = 151697
    bog_token_id: int | None = 151706
    eog_token_id: int | None = 151707
    bss_token_id: int | None = 151746
    ess_token_id: int | None = 151747
    eol_token_id: int | None = 151846
    eof_token_id: int | None = 151847
    tms_token_id: int | None = 151848
    bos_token_id: int | None = 151849
    eos_token_id: int | None = 151850
    img_token_id: int | None = 151851
    boi_token_id: int | None = 151852
    eoi_token_id: int | None = 151853
    visual_token_offset: int = 151854
    num_visual_tokens: int = 131072
    digit_token_ids: list[int] | tuple[int, ...] = tuple(range(15, 25))
    size_separator_token_id: int | None = 9
    size_digits: list[int] | tuple[int, ...] = (2, 2)

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Role -> id, for the roles this vocabulary has."""
        ids = {role: getattr(self, f"{role}_token_id") for role in SPECIAL_TOKENS}
        return {role: token_id for role, token_id in ids.items() if token_id is not None}

    @property
    def visual_token_end(self) -> int:
        """One past the last visual id."""
        return self.visual_token_offset + self.num_visual_tokens

    @property
    def visual_token_ids(self) -> range:
        """All visual ids.  For loops over tokens: to read an attribute of a configuration takes microseconds."""
        return range(self.visual_token_offset, self.visual_token_end)

    def size_token_ids(self, token_height: int, token_width: int) -> list[int]:
        """Ids of `"h*w"`, for example `[20, 20, 9, 22, 18]` for 55 x 73 codes in the released vocabulary."""
        height, width = ([self.digit_token_ids[int(digit)] for digit in str(n)] for n in (token_height, token_width))
        return [*height, self.size_separator_token_id, *width]

    def image_token_ids(self, visual_token_ids: list[list[int]]) -> list[int]:
        """All ids of one image, from BOI to EOI.

        Args:
            visual_token_ids (`list[list[int]]`): `token_height` rows of `token_width` vocabulary ids (not codes).
        """
        height, width = len(visual_token_ids), len(visual_token_ids[0])
        ids = [self.boi_token_id, *self.size_token_ids(height, width), self.img_token_id]
        for index, row in enumerate(visual_token_ids):
            ids += row
            ids.append(self.eoi_token_id if index == height - 1 else self.eol_token_id)
        return ids

    def num_image_tokens(self, token_height: int, token_width: int) -> int:
        """Length of `image_token_ids` of such an image, BOI and EOI included."""
        return 2 + len(self.size_token_ids(token_height, token_width)) + token_height * (token_width + 1)

    def validate_special_ids(self):
        special = self.special_token_ids
        for role, token_id in special.items():
            if token_id < 0:
                raise ValueError(f"`{role}_token_id` must not be negative, got {token_id}.")
            if self.visual_token_offset <= token_id < self.visual_token_end:
                raise ValueError(
                    f"`{role}_token_id`={token_id} lies inside the visual range "
                    f"[{self.visual_token_offset}, {self.visual_token_end}). Give it an id outside."
                )
        by_id: dict[int, str] = {}
        for role, token_id in special.items():
            if token_id in by_id:
                raise ValueError(
                    f"special token ids must be distinct, but `{role}_token_id` and `{by_id[token_id]}_token_id` are "
                    f"both {token_id}."
                )
            by_id[token_id] = role

    def validate_visual_range(self):
        if self.visual_token_offset < 0 or self.num_visual_tokens < 0:
            raise ValueError(
                f"`visual_token_offset` and `num_visual_tokens` must not be negative, got {self.visual_token_offset} "
                f"and {self.num_visual_tokens}."
            )

    def validate_size_tokens(self):
        sizes = [*self.digit_token_ids, self.size_separator_token_id]
        if len(self.digit_token_ids) not in (0, 10) or len(set(sizes)) != len(sizes):
            raise ValueError(
                "`digit_token_ids` must hold ten distinct ids, different from `size_separator_token_id`; got "
                f"{list(self.digit_token_ids)} and {self.size_separator_token_id}."
            )
        if len(self.size_digits) != 2 or not 1 <= self.size_digits[0] <= self.size_digits[1]:
            raise ValueError(f"`size_digits` must be [smallest, largest] with 1 <= smallest, got {self.size_digits}.")


@strict
class Emu35TextConfig(Qwen3Config):
    r"""
    The decoder: Qwen3's, plus the dropouts of the release.  Defaults: 34.1 B parameters.

    Args:
        embedding_dropout (`float`): on the embeddings, in training.
        residual_dropout (`float`): on both residual branches of each layer, in training.
    """

    model_type = "emu35_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0

    vocab_size: int = 282926
    hidden_size: int = 5120
    intermediate_size: int = 25600
    num_hidden_layers: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    attention_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.1
    residual_dropout: float | int = 0.1

    def validate_dropouts(self):
        for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")


@strict
class Emu35VisionTokenizerConfig(PreTrainedConfig):
    r"""
    IBQ vision tokenizer (arXiv 2412.02692).  Defaults: the released one, 455 M parameters, 16 pixels a code side.

    Args:
        codebook_size (`int`): number of codes.
        embed_dim (`int`): width of a codebook row.
        latent_channels (`int`): channels of the encoder's output, before `quant_conv`.
        base_channels (`int`), channel_multiplier (`list[int]`): channels of level i are their product.
        num_res_blocks (`int`): residual blocks a level (the decoder has one more).
        attn_resolutions (`list[int]`), resolution (`int`):
            a level has attention where `resolution / 2**level` is listed. Nominal: any image size can be encoded.
        mid_attention (`bool`):
            attention between the two middle blocks. Without it, codes depend on their neighbourhood only.
        dropout (`float`): inside residual blocks, in training.
        norm_num_groups (`int`):
            groups of every GroupNorm. The release has 32. As many groups as channels is instance norm, which wipes
            out flat colours.
        normalize_latents (`bool`):
            cosine instead of plain dot product between latents and codes (keeps small codebooks from collapsing).
        logit_scale (`float`): factor of the logits in training; the code chosen does not depend on it.
        reconstruction_loss (`str`): "l1" or "l2".
        quantization_loss_weight, commitment_loss_weight (`float`): pull codes to latents, and latents to codes.
        entropy_loss_weight (`float`): of IBQ's entropy term (confident codes, evenly used codebook).
        initializer_range (`float`): standard deviation of a fresh codebook.
    """

    model_type = "emu35_vision_tokenizer"
    base_config_key = "vision_tokenizer_config"

    codebook_size: int = 131072
    embed_dim: int = 256
    latent_channels: int = 256
    base_channels: int = 256
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    attn_resolutions: list[int] | tuple[int, ...] = (16,)
    resolution: int = 256
    mid_attention: bool = True
    in_channels: int = 3
    out_channels: int = 3
    dropout: float | int = 0.0
    norm_num_groups: int = 32
    normalize_latents: bool = False
    logit_scale: float | int = 1.0
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    quantization_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    entropy_loss_weight: float | int = 0.05
    initializer_range: float = 0.02

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one code."""
        return 2 ** (len(self.channel_multiplier) - 1)

    def validate_channels(self):
        for multiplier in self.channel_multiplier:
            if self.base_channels * multiplier % self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups`={self.norm_num_groups} must divide every level's channels, but "
                    f"`base_channels` x `channel_multiplier` has {self.base_channels * multiplier}."
                )

    def validate_codebook(self):
        if self.codebook_size < 1 or self.embed_dim < 1:
            raise ValueError(
                f"`codebook_size` and `embed_dim` must be positive, got {self.codebook_size} and {self.embed_dim}."
            )


def is_released_config(config_dict: dict[str, Any]) -> bool:
    """Is this the release's own flat `config.json`?"""
    return config_dict.get("model_type") == "Emu3" and "text_config" not in config_dict


def _from_release(released: dict[str, Any]) -> dict[str, Any]:
    """The release's flat `config.json` (`model_type` "Emu3") as keyword arguments of [`Emu35Config`].

    The file names only some of the special ids, and not where the visual ids begin. The released vocabulary is
    recognised by its size; in any other one the ids it does not name are unknown (`None`), and there are no visual
    ids.
    """
    names = {f"{role}_token_id" for role in SPECIAL_TOKENS}
    ids = {key: value for key, value in released.items() if key in names}
    text = {key: value for key, value in released.items() if key in Emu35TextConfig.default_config_fields()}
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype"):
        if released.get(key) is not None:
            text[key] = released[key]
    for key in ("model_type", "architectures", "transformers_version"):
        text.pop(key, None)
    layout = _layout_for(released.get("vocab_size")) | ids
    config = {"text_config": text, "token_layout": layout, "vision_tokenizer_config": None}
    for key in ("torch_dtype", "dtype"):
        if released.get(key) is not None:
            config["dtype"] = released[key]
    return config


def _layout_for(vocab_size: int | None) -> dict[str, Any]:
    """What is known of a layout from the size of the vocabulary: all of the released one, nothing of any other."""
    if vocab_size is None or vocab_size == Emu35TextConfig.vocab_size:
        return {}
    unknown = dict.fromkeys(f"{role}_token_id" for role in SPECIAL_TOKENS)
    visual = {"visual_token_offset": vocab_size, "num_visual_tokens": 0}
    return unknown | visual | {"digit_token_ids": [], "size_separator_token_id": None}


@strict
class Emu35Config(PreTrainedConfig):
    r"""
    Text decoder + vision tokenizer + token layout.  Defaults: the released 34 B model.

    `from_pretrained` also reads the release's own flat `config.json`.

    Args:
        text_config (`Emu35TextConfig` or `dict`): the decoder.
        vision_tokenizer_config (`Emu35VisionTokenizerConfig`, `dict` or `None`):
            `None`: no vision tokenizer (as in the released language-model checkpoints); text and codes work, pixels
            don't.
        token_layout (`Emu35TokenLayout` or `dict`): which id means what.
        visual_loss_weight (`float`): weight of a visual token in the loss; text and structure tokens have weight 1.
        dida_adapted (`bool`):
            whether the weights themselves were trained to denoise images, so that `image_decoder="dida"` needs no
            adapter. The checkpoint then has a `scheduler_config.json`.
    """

    model_type = "emu35"
    sub_configs_defaults = {
        "text_config": Emu35TextConfig,
        "vision_tokenizer_config": SubConfigSpec(Emu35VisionTokenizerConfig, optional=True),
    }

    text_config: dict | Emu35TextConfig | None = None
    vision_tokenizer_config: dict | Emu35VisionTokenizerConfig | None = field(
        default_factory=lambda: Emu35VisionTokenizerConfig()
    )
    token_layout: dict | Emu35TokenLayout | None = None
    visual_loss_weight: float | int = 0.5
    dida_adapted: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Not one of `sub_configs_defaults`: transformers expects a module with an attention behind each of those.
        if not isinstance(self.token_layout, Emu35TokenLayout):
            self.token_layout = Emu35TokenLayout(**(self.token_layout or {}))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if is_released_config(config_dict):
            config_dict = _from_release(config_dict)
        elif config_dict.get("model_type") == Emu35TextConfig.model_type:  # what a bare Emu35Model saves
            layout = _layout_for(config_dict.get("vocab_size"))
            config_dict = {"text_config": config_dict, "token_layout": layout, "vision_tokenizer_config": None}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        # Not the base class's own version: that warns about `model_type` "Emu3" before `from_dict` can translate it.
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, Emu35TextConfig.model_type) and not is_released_config(config_dict):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a `{model_type}` model. Emu35Config reads `{cls.model_type}` "
                "checkpoints and the release's own (`Emu3`)."
            )
        return cls.from_dict(config_dict, **kwargs)

    def validate_visual_range(self):
        if self.token_layout.visual_token_end > self.text_config.vocab_size:
            raise ValueError(
                f"visual ids [{self.token_layout.visual_token_offset}, {self.token_layout.visual_token_end}) do not "
                f"fit into `vocab_size`={self.text_config.vocab_size}."
            )
        for role, token_id in self.token_layout.special_token_ids.items():
            if token_id >= self.text_config.vocab_size:
                raise ValueError(
                    f"`{role}_token_id`={token_id} does not fit into `vocab_size`={self.text_config.vocab_size}."
                )

    def validate_codebook(self):
        vision = self.vision_tokenizer_config
        if vision is not None and vision.codebook_size > self.token_layout.num_visual_tokens:
            raise ValueError(
                f"the vision tokenizer's `codebook_size`={vision.codebook_size} is larger than "
                f"`num_visual_tokens`={self.token_layout.num_visual_tokens} of the token layout."
            )

    def validate_visual_loss_weight(self):
        if self.visual_loss_weight < 0:
            raise ValueError(f"`visual_loss_weight` must not be negative, got {self.visual_loss_weight}.")


__all__ = [
    "SPECIAL_TOKENS",
    "Emu35Config",
    "Emu35TextConfig",
    "Emu35TokenLayout",
    "Emu35VisionTokenizerConfig",
]
