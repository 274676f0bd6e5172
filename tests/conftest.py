"""Tiny models that every test may use.  All of them are built in code: nothing is downloaded."""

import copy
import os

import pytest
import torch
from emu35 import Emu35Config, Emu35ForConditionalGeneration
from emu35.image_processing_emu35 import Emu35ImageProcessor
from emu35.processing_emu35 import Emu35Processor
from emu35.tokenization_emu35 import token_layout_from_tokenizer, train_small_tokenizer

NUM_VISUAL_TOKENS = 48
#: Pixels a side of one code of the tiny vision tokenizer.
FACTOR = 4

TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads, as in the released model
    "max_position_embeddings": 512,
}
TINY_VISION = {
    "codebook_size": NUM_VISUAL_TOKENS,
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 8,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_num_groups": 4,
}


def pytest_configure(config):
    # One thread a process is what two cores shared with other work can bear, and makes sums reproducible.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A vocabulary of 330 tokens: bytes, control tokens and the words of the prompts."""
    texts = ["You are a helpful assistant for t2i x2i story task. USER: a red fox, a blue square ASSISTANT: "] * 3
    return train_small_tokenizer(texts, vocab_size=330, model_max_length=TINY_TEXT["max_position_embeddings"])


@pytest.fixture(scope="session")
def tiny_layout(tiny_tokenizer):
    return token_layout_from_tokenizer(tiny_tokenizer, num_visual_tokens=NUM_VISUAL_TOKENS, size_digits=(1, 2))


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer, tiny_layout):
    return Emu35Processor(Emu35ImageProcessor(factor=FACTOR), tiny_tokenizer, tiny_layout, image_area=16 * 16)


@pytest.fixture(scope="session")
def make_tiny_config(tiny_layout):
    """`make_tiny_config(attention_dropout=0.2, token_layout={...}, vision_tokenizer_config=None)`"""

    def make(token_layout: dict | None = None, vision_tokenizer_config="tiny", visual_loss_weight=0.5, **text):
        layout = {**tiny_layout.to_dict(), **(token_layout or {})}
        layout.pop("model_type", None)
        text = {"vocab_size": layout["visual_token_offset"] + layout["num_visual_tokens"], **TINY_TEXT, **text}
        return Emu35Config(
            text_config=text,
            vision_tokenizer_config=dict(TINY_VISION)
            if vision_tokenizer_config == "tiny"
            else vision_tokenizer_config,
            token_layout=layout,
            visual_loss_weight=visual_loss_weight,
        )

    return make


@pytest.fixture(scope="session")
def make_tiny_model(make_tiny_config):
    """`make_tiny_model(seed=0, **config)`: a random model whose logits are as spread out as a trained model's."""

    def make(seed: int = 0, **config):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)  # of the vision tokenizer, which stays as it is initialised
            model = Emu35ForConditionalGeneration(make_tiny_config(**config)).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.startswith("vision_tokenizer.") and not name.endswith("embedding.weight"):
                continue
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 1 + 0.3 * noise
            else:
                std = 1.0 if "embed" in name else 1.2 / parameter.shape[1] ** 0.5
                parameter.data = std * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def shared_tiny_model(make_tiny_model):
    """For tests that leave it as it is."""
    return make_tiny_model()


@pytest.fixture
def tiny_model(shared_tiny_model):
    """A copy of `shared_tiny_model` to change at will."""
    return copy.deepcopy(shared_tiny_model)
