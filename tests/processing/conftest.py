"""Processors for the tests: a small one, trained on the spot, and the released one where its tokenizer is at hand."""

import json
import os
from pathlib import Path

import pytest
from emu35.image_processing_emu35 import Emu35ImageProcessor
from emu35.processing_emu35 import Emu35Processor
from emu35.tokenization_emu35 import (
    TIKTOKEN_FILE,
    token_layout_from_tokenizer,
    tokenizer_from_tiktoken,
    train_small_tokenizer,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"

TEXTS = [
    "You are a helpful assistant for t2i x2i howto story explore vla task. Please generate a response with "
    "interleaved text and images. USER: a small red circle above a large blue square ASSISTANT: ",
    "What colour is the circle? red. How many squares are there? 3. yes no",
] * 3


@pytest.fixture(scope="session")
def fixtures_dir():
    return FIXTURES


@pytest.fixture(scope="session")
def fixture_json():
    def read(name):
        return json.loads((FIXTURES / name).read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def small_tokenizer():
    return train_small_tokenizer(TEXTS, vocab_size=512, model_max_length=1024)


@pytest.fixture
def small(small_tokenizer):
    """A processor of 600 visual tokens, 16 pixels a code, images of about 64 x 64 pixels."""
    layout = token_layout_from_tokenizer(small_tokenizer, num_visual_tokens=600, size_digits=(1, 2))
    return Emu35Processor(Emu35ImageProcessor(), small_tokenizer, layout, image_area=64 * 64)


@pytest.fixture(scope="session")
def released_tokenizer():
    directory = os.environ.get("EMU35_TOKENIZER_DIR")
    if not directory or not (Path(directory) / TIKTOKEN_FILE).is_file():
        pytest.skip(f"needs the release's {TIKTOKEN_FILE}: set EMU35_TOKENIZER_DIR to its directory")
    return tokenizer_from_tiktoken(directory)


@pytest.fixture
def released(released_tokenizer):
    return Emu35Processor(Emu35ImageProcessor(), released_tokenizer)


@pytest.fixture(scope="session")
def reference_vision_tokenizer():
    """`ibq_main` of the reference: random weights, 512 codes."""
    directories = [FIXTURES / "ibq_main", Path(os.environ.get("EMU35_REFERENCE_DIR", FIXTURES)) / "ibq_main"]
    directory = next((directory for directory in directories if (directory / "config.yaml").is_file()), None)
    if directory is None:
        pytest.skip("needs `ibq_main` in tests/fixtures or in EMU35_REFERENCE_DIR")
    from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

    return Emu35VisionTokenizer.from_pretrained(directory)
