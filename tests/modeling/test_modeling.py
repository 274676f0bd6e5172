"""The decoder and its composite: attention kinds, caches, parallelism plans, dropouts, logits on demand, images."""

import copy

import pytest
import torch
from emu35 import Emu35ForConditionalGeneration
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import DynamicCache


@pytest.fixture(scope="module")
def model(shared_tiny_model):
    return shared_tiny_model


@pytest.fixture(scope="module")
def ids(model):
    """Text and visual tokens, `(2, 17)`."""
    ids = torch.randint(model.config.text_config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    control = [*model.config.token_layout.special_token_ids.values()]
    return torch.where(torch.isin(ids, torch.tensor(control)), 60, ids)


@pytest.fixture(scope="module")
def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def close(got, expected, **tolerances):
    torch.testing.assert_close(got, expected, **{"atol": 2e-5, "rtol": 1e-4, **tolerances})


# --- attention ---


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attention_implementations_agree(tiny_model, padded, attention):
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model(**padded).logits
    tiny_model.set_attn_implementation(attention)
    assert tiny_model.model.config._attn_implementation == attention
    keep = padded["attention_mask"].bool()
    close(tiny_model(**padded).logits[keep], expected[keep])
    close(tiny_model(padded["input_ids"][:1]).logits, expected[:1])


def test_attention_implementation_reaches_generation(tiny_model, padded):
    answers = []
    for attention in ("sdpa", "eager"):
        tiny_model.set_attn_implementation(attention)
        answers.append(
            tiny_model.generate(
                padded["input_ids"],
                padded["attention_mask"],
                generation_mode="image",
                height=8,
                width=12,
                do_sample=False,
            ).sequences
        )
    assert torch.equal(*answers)


def test_padding_changes_nothing(model, ids, padded):
    with torch.no_grad():
        alone = model(ids[1:, 6:]).logits
        close(model(**padded).logits[1:, 6:], alone)


# --- caches ---


@torch.no_grad()
def test_caches_equal_the_uncached_pass(model, ids):
    expected = model(ids).logits
    static = StaticCache(config=model.config, max_cache_len=20)
    for cache in (DynamicCache(config=model.config.text_config), static):
        parts = [
            model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
            for begin, end in ((0, 7), (7, 8), (8, 15), (15, 17))
        ]
        close(torch.cat(parts, dim=1), expected)


@torch.no_grad()
def test_a_cache_is_returned_on_request(model, ids):
    assert model(ids, use_cache=False).past_key_values is None
    output = model(ids, use_cache=True)
    assert output.past_key_values.get_seq_length() == 17


def test_embeddings_instead_of_ids(model, ids):
    with torch.no_grad():
        close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 17, 32)}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**inputs)


# --- training ---


def test_gradient_checkpointing_gives_the_same_gradients(make_tiny_model, ids):
    model = make_tiny_model(attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0).train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    # Its name in transformers 5.23; the older one warns there.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    layers = model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    calls = []
    handle = layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    got = gradients()
    handle.remove()
    assert len(calls) == 2  # once more in the backward pass
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name], msg=name)


@pytest.mark.parametrize("dropout", ["attention_dropout", "embedding_dropout", "residual_dropout"])
def test_dropouts_act_in_training_only(make_tiny_model, ids, dropout):
    off = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0}
    model = make_tiny_model(**{**off, dropout: 0.5})
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.train()
        first, second = model(ids).logits, model(ids).logits
    assert not torch.allclose(first, expected, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(make_tiny_model(**off).train()(ids).logits.detach(), expected)


def test_released_dropouts_are_the_default(model):
    text = model.config.text_config
    assert (text.attention_dropout, text.embedding_dropout, text.residual_dropout) == (0.1, 0.1, 0.1)


def test_residual_dropout_is_on_both_branches(make_tiny_model, ids):
    """With everything dropped on them, a layer is the identity."""
    model = make_tiny_model(attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.5).train()
    for layer in model.model.layers:
        layer.residual_dropout = 1.0
    with torch.no_grad():
        hidden_states = model.model(ids).last_hidden_state
        close(hidden_states, model.model.norm(model.model.embed_tokens(ids)))


# --- plans, devices, compilation ---


def test_tensor_parallel_plan_names_every_matrix(model):
    plan = model.tp_plan
    assert plan["lm_head"] == "colwise_gather_output"
    for name, module in model.named_modules():
        if not name.startswith("vision_tokenizer") and isinstance(module, nn.Linear):
            assert name in plan or any(name.startswith("model.layers") and _matches(key, name) for key in plan), name
    names = [name for name, _ in model.named_modules()]
    for key in plan:
        assert any(_matches(key, name) for name in names), f"{key} names nothing"
    assert set(plan.values()) <= _parallel_styles()


def _matches(key, name):
    parts, pattern = name.split("."), key.split(".")
    return len(parts) == len(pattern) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True))


def _parallel_styles():
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    return set(ALL_PARALLEL_STYLES.keys())


def test_layers_are_not_split_between_devices(model):
    names = {type(module).__name__ for module in model.modules()}
    assert set(Emu35ForConditionalGeneration._no_split_modules) <= names


@pytest.fixture(params=["whole", "offloaded", "on disk"])
def dispatched(request, tiny_model, tmp_path):
    """A model under accelerate's hooks."""
    from accelerate import cpu_offload, disk_offload, dispatch_model

    if request.param == "whole":
        return dispatch_model(tiny_model, device_map={"": "cpu"}, force_hooks=True)
    if request.param == "offloaded":
        cpu_offload(tiny_model, execution_device=torch.device("cpu"))
    else:
        disk_offload(tiny_model, tmp_path, execution_device=torch.device("cpu"))
    assert tiny_model.lm_head.weight.device.type == "meta"
    return tiny_model


def test_dispatched_models_compute_the_same(dispatched, shared_tiny_model, ids):
    with torch.no_grad():
        close(dispatched(ids).logits, shared_tiny_model(ids).logits)
        for vocabulary in ("text", "visual"):
            expected = shared_tiny_model(ids, vocabulary=vocabulary).logits
            close(dispatched(ids, vocabulary=vocabulary).logits, expected)
    settings = {"generation_mode": "image", "height": 8, "width": 8, "do_sample": False}
    expected = shared_tiny_model.generate(ids, **settings)
    output = dispatched.generate(ids, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert [image.tobytes() for images in output.images for image in images] == [
        image.tobytes() for images in expected.images for image in images
    ]


def test_generate_runs_offloading_hooks(tiny_model, ids):
    """As diffusers attaches them to move a whole model when it is called."""

    class Hook:
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1

    tiny_model._hf_hook = Hook()
    tiny_model.generate(ids, max_new_tokens=2)
    assert tiny_model._hf_hook.calls == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward(tiny_model, ids):
    compiled = torch.compile(tiny_model, fullgraph=True, backend="inductor")
    close(compiled(ids).logits, tiny_model(ids).logits)
    torch._dynamo.reset()


@torch.no_grad()
def test_forward_is_one_graph(tiny_model, ids):
    """What torch.compile has to trace, without the minutes that code generation takes."""
    compiled = torch.compile(tiny_model, fullgraph=True, backend="eager")
    close(compiled(ids).logits, tiny_model(ids).logits)
    close(compiled(ids, vocabulary="visual", logits_to_keep=1).logits, tiny_model(ids).logits[:, -1:, -48:])
    torch._dynamo.reset()


def test_compiled_loss(tiny_model, ids):
    compiled = torch.compile(tiny_model, backend="eager")
    close(compiled(ids, labels=ids).loss, tiny_model(ids, labels=ids).loss)
    torch._dynamo.reset()


@torch.no_grad()
def test_half_precision_is_near(tiny_model, ids):
    expected = tiny_model(ids).logits
    logits = tiny_model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


# --- logits on demand ---


@torch.no_grad()
def test_logits_to_keep(model, ids):
    full = model(ids).logits
    assert full.shape == (2, 17, model.config.text_config.vocab_size)
    close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    close(model(ids, logits_to_keep=0).logits, full)
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])


def lora_head(model):
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    return peft_model.base_model.model


def int8_head(model):
    from bitsandbytes.nn import Linear8bitLt

    head = Linear8bitLt(32, model.lm_head.out_features, bias=False, has_fp16_weights=False)
    head.load_state_dict({"weight": model.lm_head.weight.data})
    model.lm_head = head.to("cpu")
    return model


def hooked_head(model):
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def wrapped_head(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    return model


@pytest.mark.parametrize("change", [lambda model: model, lora_head, int8_head, hooked_head, wrapped_head])
@torch.no_grad()
def test_parts_of_the_vocabulary_equal_slices(tiny_model, ids, change):
    model = change(tiny_model).eval()
    layout = model.config.token_layout
    begin, end = layout.visual_token_offset, layout.visual_token_end
    full = model(ids).logits
    close(model(ids, vocabulary="visual").logits, full[..., begin:end])
    close(model(ids, vocabulary="text", logits_to_keep=2).logits, full[:, -2:, :begin])


@torch.no_grad()
def test_text_ids_on_both_sides_of_the_visual_range(make_tiny_model, ids):
    model = make_tiny_model(vocab_size=400)
    layout = model.config.token_layout
    begin, end = layout.visual_token_offset, layout.visual_token_end
    assert end < 400
    full = model(ids).logits
    close(model(ids, vocabulary="text").logits, torch.cat([full[..., :begin], full[..., end:]], dim=-1))
    close(model(ids, vocabulary="visual").logits, full[..., begin:end])


def test_only_the_rows_asked_for_are_read(tiny_model, ids):
    """NaN in one part of the matrix does not reach the other."""
    offset = tiny_model.config.token_layout.visual_token_offset
    tiny_model.lm_head.weight.data[offset:] = float("nan")
    with torch.no_grad():
        assert tiny_model(ids, vocabulary="text").logits.isfinite().all()
        assert tiny_model(ids, vocabulary="visual").logits.isnan().all()


def test_unknown_part_of_the_vocabulary(model, ids):
    with pytest.raises(ValueError, match='`vocabulary` must be "all", "text" or "visual", got \'images\''):
        model(ids, vocabulary="images")


# --- adapters, quantised layers ---


def test_generation_with_an_adapter(tiny_model, ids):
    from peft import LoraConfig, get_peft_model

    settings = {"generation_mode": "image", "height": 8, "width": 8, "do_sample": False}
    before = tiny_model.generate(ids, **settings).sequences
    adapted = get_peft_model(
        copy.deepcopy(tiny_model),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False),
    ).eval()
    after = adapted.generate(input_ids=ids, **settings).sequences
    assert after.shape == before.shape and not torch.equal(after, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(input_ids=ids, **settings).sequences, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_generate(make_tiny_model, tmp_path, ids, bits):
    from transformers import BitsAndBytesConfig

    model = make_tiny_model(hidden_size=64)
    model.save_pretrained(tmp_path)
    quantised = Emu35ForConditionalGeneration.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        device_map="cpu",
    )
    assert quantised.vision_tokenizer.dtype == torch.float32
    settings = {"generation_mode": "image", "height": 8, "width": 8, "do_sample": False}
    output = quantised.generate(ids, negative_prompt_ids=ids[:, :3], guidance_scale=2.0, **settings)
    assert len(output.images[0]) == len(output.images[1]) == 1
    quantised.generate(ids, max_new_tokens=3)


# --- images ---


@pytest.fixture
def inputs(tiny_processor):
    from PIL import Image

    images = [
        Image.new("RGB", (20, 12), "red"),
        [Image.new("RGB", (16, 16), "blue"), Image.new("RGB", (8, 24), "white")],
    ]
    return tiny_processor(text=["one", "two"], images=images, task="x2i")


def test_placeholders_become_visual_tokens(model, inputs):
    layout = model.config.token_layout
    resolved = model.resolve_image_tokens(**inputs)
    assert set(resolved) == set(inputs) - {"pixel_values", "image_sizes"}
    codes = torch.cat([grid.flatten() for grid in model.encode_image(inputs["pixel_values"])]).tolist()
    for key in ("input_ids", "negative_prompt_ids"):
        holes = inputs[key] == layout.image_placeholder_token_id
        assert (resolved[key][holes] - layout.visual_token_offset).tolist() == codes
        assert torch.equal(resolved[key][~holes], inputs[key][~holes])
    assert torch.equal(resolved["negative_image_prompt_ids"], inputs["negative_image_prompt_ids"])
    # There is nothing left to resolve.
    again = model.resolve_image_tokens(**resolved)
    assert torch.equal(again["input_ids"], resolved["input_ids"])


def test_placeholders_and_images_that_do_not_match(model, inputs, ids):
    with pytest.raises(ValueError, match=r"`input_ids` has \d+ image placeholders but there are no `pixel_values`"):
        model.resolve_image_tokens(input_ids=inputs["input_ids"])
    with pytest.raises(
        ValueError, match=r"`input_ids` has \d+ image placeholders but `pixel_values` give \d+ visual tokens"
    ):
        model.resolve_image_tokens(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])
    with pytest.raises(
        ValueError, match="`input_ids` has 0 image placeholders but `pixel_values` give 15 visual tokens"
    ):
        model.resolve_image_tokens(input_ids=torch.ones_like(ids), pixel_values=inputs["pixel_values"][:1])


def test_forward_with_pixels(model, inputs):
    resolved = model.resolve_image_tokens(**inputs)
    arguments = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = model(
            resolved["input_ids"], inputs["attention_mask"], labels=resolved["input_ids"], logits_to_keep=0
        )
        output = model(**arguments, labels=inputs["input_ids"], logits_to_keep=0)
    close(output.logits, expected.logits)
    close(output.loss, expected.loss)  # placeholders in the labels are visual tokens too
    with pytest.raises(ValueError, match="`pixel_values` needs `input_ids`"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=inputs["pixel_values"])


def test_images_of_any_size_and_form(model):
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = model.encode_image(pixels)
    assert [tuple(grid.shape) for grid in codes] == [(2, 3), (2, 3)]
    assert torch.equal(model.encode_image([pixels[0], pixels[1:]])[1], codes[1])
    decoded = model.decode_image([codes[0], codes[1][:1]])
    assert [tuple(image.shape) for image in decoded] == [(3, 8, 12), (3, 4, 12)]


def test_many_images_go_through_in_several_passes(model, monkeypatch):
    pixels = [torch.rand(3, 4 * (1 + index % 2), 8) * 2 - 1 for index in range(5)]
    expected = [model.encode_image([image])[0] for image in pixels]
    sizes = []
    vision_tokenizer = model.vision_tokenizer
    for name in ("encode", "decode"):
        original = getattr(type(vision_tokenizer), name)

        def recorded(images, original=original):
            sizes.append(len(images))
            return original(vision_tokenizer, images)

        monkeypatch.setattr(vision_tokenizer, name, recorded, raising=False)
    monkeypatch.setattr("emu35.modeling_emu35.PIXELS_PER_PASS", 100)  # images of 32 and 64 pixels
    codes = model.encode_image(pixels)
    images = model.decode_image(codes)
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert all(torch.equal(got, wanted) for got, wanted in zip(codes, expected, strict=True))
    assert [image.shape for image in images] == [image.shape for image in pixels]
    monkeypatch.setattr("emu35.modeling_emu35.PIXELS_PER_PASS", 1)
    assert len(model.encode_image(pixels)) == 5
    assert model.encode_image([]) == model.decode_image([]) == []


def test_decode_image_tokens(model, ids):
    layout = model.config.token_layout
    grids = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7]])]
    first, last = (layout.image_token_ids((grid + layout.visual_token_offset).tolist()) for grid in grids)
    pad = [layout.pad_token_id] * (len(first) + 3)
    sequences = torch.tensor([[60, *last, *first, 61, 62], [60, *first, *last, 61, 62]])
    for given in (sequences, model.generate(sequences, max_new_tokens=1, generation_mode="text")):
        images = model.decode_image_tokens(given)
        for image, grid in zip(images, grids, strict=True):
            close(image, model.decode_image([grid])[0])
    with pytest.raises(ValueError, match="row 0 of `sequences` has no image"):
        model.decode_image_tokens(torch.tensor([pad]))
    with pytest.raises(ValueError, match="row 1 of `sequences` has no image, or the last one is not complete"):
        model.decode_image_tokens(torch.tensor([[60, *first], [60, *first[:-1], 60]]))


def test_pixels_need_a_vision_tokenizer(make_tiny_model):
    model = make_tiny_model(vision_tokenizer_config=None)
    for call in (
        lambda: model.encode_image(torch.zeros(1, 3, 8, 8)),
        lambda: model.decode_image([torch.zeros(1, 1).long()]),
    ):
        with pytest.raises(ValueError, match="has no vision tokenizer"):
            call()
