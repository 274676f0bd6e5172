"""The cache with room to grow against transformers' own, and the static one against both."""

import pytest
import torch
from emu35.cache_emu35 import GrowingCache
from emu35.static_decoding_emu35 import StaticDecoder
from test_generation import GUIDANCE
from test_image_mask import complete, mask_of, random_codes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache

STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module")
def model(shared_tiny_model):
    return shared_tiny_model


def states(columns, seed, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, columns, 16, generator=generator) for _ in range(2)]


def assert_same(cache, expected):
    assert cache.get_seq_length() == expected.get_seq_length()
    for own, other in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(own.keys, other.keys)
        assert torch.equal(own.values, other.values)


# --- room to grow ---


@pytest.mark.parametrize("reserve", [0, 100])
def test_growing_cache_equals_a_dynamic_one(model, reserve):
    config = model.config.text_config
    caches = [GrowingCache(config), DynamicCache(config=config)]
    caches[0].reserve(reserve)
    # Up to, into and past the room that the first update leaves.
    for step, columns in enumerate((5, 1, 1, 63, 1, 200, 1)):
        for number in range(config.num_hidden_layers):
            returned = [cache.update(*states(columns, 10 * step + number), number) for cache in caches]
            assert all(torch.equal(*pair) for pair in zip(*returned, strict=True))
        assert_same(*caches)
    for cache in caches:
        cache.crop(-150)
        cache.update(*states(3, 99), 0)
        cache.update(*states(3, 98), 1)
    assert_same(*caches)
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.update(*states(2, 97), 0)
        cache.update(*states(2, 96), 1)
    assert_same(*caches)
    for cache in caches:
        cache.reset()
        cache.update(*states(4, 95, rows=3), 0)
        cache.update(*states(4, 94, rows=3), 1)
    assert_same(*caches)


def test_growing_cache_writes_in_place(model):
    cache = GrowingCache(model.config.text_config)
    cache.reserve(100)
    cache.update(*states(5, 0), 0)
    place = cache.layers[0].keys.data_ptr()
    for step in range(100):
        cache.update(*states(1, step), 0)
    cache.crop(-50)
    cache.update(*states(50, 0), 0)
    assert cache.layers[0].keys.data_ptr() == place
    cache.update(*states(1, 0), 0)
    assert cache.layers[0].keys.data_ptr() != place


def test_tensors_put_in_place_of_a_growing_caches_own_stay_as_they_are(model):
    cache = GrowingCache(model.config.text_config)
    cache.update(*states(5, 0), 0)
    mine = states(4, 1)
    before = mine[0].clone()
    cache.layers[0].keys, cache.layers[0].values = mine
    cache.update(*states(1, 2), 0)
    assert torch.equal(cache.layers[0].keys[:, :, :4], before)
    assert torch.equal(mine[0], before)


# --- static ---


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_static_equals_dynamic(model, guidance):
    """Prompts of different lengths, so that there are masked columns."""
    settings = {"rows": (0, 1), "guidance": guidance, "height": 16, "width": 20}
    expected, dynamic = complete(model, **settings)
    made, static = complete(model, **settings, **STATIC)
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert static.num_forward_passes == dynamic.num_forward_passes


@pytest.mark.parametrize("coupling", ["none", "gumbel"])
def test_speculative_static_equals_dynamic(model, coupling, monkeypatch):
    """Rows advance by different lengths, and what a pass computed in vain is dropped again."""
    settings = {"rows": (0, 1, 2), "guidance": "one", "height": 24, "width": 20}
    settings |= {"image_decoder": "speculative", "coupling": coupling, "speculative_window": 5}
    expected, dynamic = complete(model, **settings)
    widths = []
    step = StaticDecoder.__call__
    monkeypatch.setattr(StaticDecoder, "__call__", lambda *args: widths.append(args[1].shape[1]) or step(*args))
    made, static = complete(model, **settings, **STATIC)
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert static.num_forward_passes == dynamic.num_forward_passes
    assert len(widths) == static.num_forward_passes - 1  # all but that of the prefix
    assert len(set(widths)) > 1


def test_static_with_given_codes(model):
    """A row that is given makes a pass wider than the static steps are."""
    settings = {"image": random_codes(model, 4, 5), "mask": mask_of("xx.xx/...../.xxx./xxxxx")}
    (expected,), _ = complete(model, **settings)
    (made,), _ = complete(model, **settings, **STATIC)
    assert torch.equal(made, expected)


def test_a_static_answer_can_be_continued(model):
    settings = {"rows": (0, 1), "guidance": "one", "height": 16, "width": 20}
    _, output = complete(model, **settings, **STATIC, return_past_key_values=True)
    cached = output.past_key_values.rows[0][0]
    fresh = model.model(torch.tensor([cached.ids]), use_cache=True).past_key_values
    for own, other in zip(cached.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, atol=1e-5, rtol=1e-5)


def test_the_static_cache_is_kept_while_it_fits(tiny_model):
    complete(tiny_model, height=16, width=20, **STATIC)
    first = tiny_model.static_decoder
    complete(tiny_model, height=16, width=16, **STATIC)
    assert tiny_model.static_decoder is first
    complete(tiny_model, height=48, width=48, **STATIC)
    larger = tiny_model.static_decoder
    assert larger.capacity > first.capacity
    complete(tiny_model, rows=(0, 1), height=16, width=16, **STATIC)
    assert tiny_model.static_decoder.rows == 2


def test_static_refuses_what_it_cannot_do(tiny_model):
    with pytest.raises(ValueError, match=r"`cache_implementation` must be one of .*'paged'"):
        complete(tiny_model, height=16, width=16, cache_implementation="paged")
    with pytest.raises(ValueError, match=r'"static" is for decoders that add to the cache'):
        complete(tiny_model, height=16, width=16, image_decoder="dida", **STATIC)
    tiny_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'needs the attention implementation "sdpa".*eager'):
        complete(tiny_model, height=16, width=16, **STATIC)


@pytest.mark.slow  # compiling takes half a minute
def test_compiled_equals_eager(tiny_model):
    settings = {"rows": (0, 1), "guidance": "one", "height": 16, "width": 20}
    expected, _ = complete(tiny_model, **settings)
    for config in (None, CompileConfig(mode="default", fullgraph=True)):
        made, _ = complete(tiny_model, **settings, cache_implementation="static", compile_config=config)
        assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))


class CountedReads(TorchDispatchMode):
    """Counts how often a value is read back from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
def test_a_row_of_an_image_waits_for_no_value(model, settings):
    """A value that the host reads keeps a GPU waiting, and can't be part of a CUDA graph."""
    counts = []
    for height, width in ((16, 16), (16, 28), (28, 16)):
        with CountedReads() as reads:
            complete(model, guidance="one", height=height, width=width, **settings)
        counts.append(reads.count)
    assert counts[0] == counts[1] == counts[2] > 0
