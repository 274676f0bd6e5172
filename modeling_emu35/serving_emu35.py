"""The language model alone, for engines that serve Qwen3: its configuration and its chat template.

Apart from dropout in training the decoder is Qwen3's, so the tensors fit as they are.
"""

import json
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config

from .configuration_emu35 import SPECIAL_TOKENS, Emu35Config, Emu35TokenLayout
from .generation_configuration_emu35 import RELEASED_DEFAULTS
from .prompts_emu35 import _ASSISTANT, _USER, NO_TASK, TASK_TEMPLATES

#: `<NAME>` stands for a literal, see [`serving_chat_template`].
_CHAT_TEMPLATE = """
{%- macro said(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part.type == "text" -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- <BOS> -}}
{%- if messages[0].role == "system" -%}
    {{- said(messages[0].content) -}}
{%- else -%}
    {%- set openings = <OPENINGS> -%}
    {{- openings.get(task, <NO_TASK>) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- <USER> + said(message.content) -}}
    {%- elif message.role == "assistant" -%}
        {{- <ASSISTANT> + said(message.content) + <END> -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- <ASSISTANT> -}}
{%- endif -%}
""".lstrip()


def qwen3_config(config: Emu35Config, dtype: torch.dtype | None = None) -> Qwen3Config:
    """The decoder's configuration as Qwen3's.  The token layout goes along; Qwen3 itself has no use for it."""
    # The class's own fields. `default_config_fields` would leave out those that default to None, RoPE's among them.
    text = {name: getattr(config.text_config, name) for name in Qwen3Config.__annotations__}
    layout = config.token_layout
    for role in ("bos", "eos", "pad"):
        text[f"{role}_token_id"] = getattr(layout, f"{role}_token_id")
    text["tie_word_embeddings"] = False
    qwen3 = Qwen3Config(**text, dtype=dtype)
    qwen3.architectures = ["Qwen3ForCausalLM"]
    layout_values = layout.to_dict()
    qwen3.token_layout = {name: layout_values[name] for name in Emu35TokenLayout.__annotations__}
    return qwen3


def qwen3_config_json(config: Qwen3Config) -> dict[str, Any]:
    """What to write into `config.json`: all values, and RoPE's also under the names that transformers 4 reads."""
    values = config.to_dict()
    values.pop("_name_or_path", None)
    rope = values.get("rope_parameters") or {}
    values["rope_theta"] = rope.get("rope_theta", Qwen3Config.default_theta)
    scaled = rope.get("rope_type", "default") != "default"
    values["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"} if scaled else None
    return values


def qwen3_generation_config(config: Emu35Config) -> GenerationConfig:
    """The release's settings for text."""
    layout = config.token_layout
    return GenerationConfig(
        bos_token_id=layout.bos_token_id,
        eos_token_id=layout.eos_token_id,
        pad_token_id=layout.pad_token_id,
        **{name: RELEASED_DEFAULTS[name] for name in ("do_sample", "top_k", "top_p", "temperature")},
    )


def serving_chat_template() -> str:
    """A Jinja template of the prompts, for text.

    A variable `task` ("t2i", ...) chooses the opening sentence, and a system message replaces it. An engine cannot
    tell control tokens that a user typed from real ones: with [`Emu35Processor`] they are plain text, behind this
    template they are not.
    """
    values = {
        "OPENINGS": {task: template.system for task, template in TASK_TEMPLATES.items()},
        "NO_TASK": NO_TASK,
        "BOS": SPECIAL_TOKENS["bos"],
        "USER": _USER,
        "ASSISTANT": _ASSISTANT + SPECIAL_TOKENS["bss"],
        "END": SPECIAL_TOKENS["ess"] + SPECIAL_TOKENS["eos"],
    }
    template = _CHAT_TEMPLATE
    for name, value in values.items():
        template = template.replace(f"<{name}>", json.dumps(value))
    return template


__all__ = ["qwen3_config", "qwen3_config_json", "qwen3_generation_config", "serving_chat_template"]
