"""The diffusers pipeline: the same images as `generate`, and what diffusers promises around them."""

import copy
import os

import emu35
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from emu35.image_processing_emu35 import Emu35ImageProcessor
from emu35.pipelines import DiDAScheduler, Emu35Pipeline
from peft import LoraConfig

FACTOR = 4  # pixels a side of one code of the tiny model
SIZE = {"height": 3 * FACTOR, "width": 5 * FACTOR}
DECODERS = {
    "ar": {"image_decoder": "ar"},
    "speculative": {"image_decoder": "speculative", "speculative_window": 4},
    "dida": {"image_decoder": "dida", "num_inference_steps": 3, "allow_unadapted": True},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Emu35Pipeline, "_progress_bar_config", {"disable": True}, raising=False)


@pytest.fixture(scope="module")
def model(make_tiny_model):
    model = make_tiny_model()
    model.generation_config = emu35.Emu35GenerationConfig(do_sample=True)
    return model


@pytest.fixture
def pipe(model, tiny_processor):
    return Emu35Pipeline(model, tiny_processor)


@pytest.fixture
def own_pipe(model, tiny_processor):
    """One whose model may be changed."""
    return Emu35Pipeline(copy.deepcopy(model), tiny_processor)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """Folder of a random DiDA adapter."""
    return save_adapter(model, tmp_path_factory.mktemp("dida"), path="absorbing")


def save_adapter(model, folder, seed=0, **scheduler):
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter(config)
    model.save_pretrained(folder)
    DiDAScheduler(num_codes=model.config.token_layout.num_visual_tokens, **scheduler).save_pretrained(folder)
    return folder


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def picture(height=16, width=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def same(images, others):
    return len(images) == len(others) and all(
        np.array_equal(np.array(one), np.array(other)) for one, other in zip(images, others, strict=True)
    )


# --- the images of generate ---


@pytest.mark.parametrize("decoder", DECODERS)
def test_text_to_image_equals_generate(pipe, decoder):
    settings = {**SIZE, "guidance_scale": 2.0, **DECODERS[decoder]}
    output = pipe("a red fox", generator=seeded(3), **settings)
    inputs = pipe.processor(text="a red fox", task="t2i")
    expected = pipe.model.generate(**inputs, generation_mode="image", generator=seeded(3), **settings)
    assert same(output.images, expected.images[0])
    assert output.images[0].size == (SIZE["width"], SIZE["height"])
    assert output.num_forward_passes == expected.num_forward_passes
    assert output.codes[0].shape == (3, 5)
    assert output.seconds > 0
    assert not same(output.images, pipe("a red fox", generator=seeded(4), **settings).images)


@pytest.mark.parametrize("decoder", DECODERS)
def test_image_to_image_equals_generate(pipe, decoder):
    settings = {"guidance_scale": 2.0, "image_guidance_scale": 1.5, "image_temperature": 0.8, **DECODERS[decoder]}
    references = [picture(seed=1), picture(seed=2)]
    output = pipe("a blue square", image=references, generator=seeded(3), **SIZE, **settings)
    inputs = pipe.processor(text="a blue square", images=references, task="x2i")
    expected = pipe.model.generate(**inputs, generation_mode="image", generator=seeded(3), **SIZE, **settings)
    assert same(output.images, expected.images[0])


def test_references_of_a_batch(pipe):
    """One may have several; with one, the image has its size; images of different sizes stay a list."""
    references = [picture(16, 16), picture(8, 32)]
    prompts = ["a red fox", "a blue square"]
    together = pipe(prompts, image=references, generator=seeded(1, 2), output_type="pt")
    assert [tuple(image.shape) for image in together.images] == [(3, 16, 16), (3, 8, 32)]
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        alone = pipe(prompt, image=reference, generator=seeded(row + 1), output_type="pt")
        assert torch.equal(alone.images[0], together.images[row])
    nested = pipe(prompts, image=[references, [references[0]]], generator=seeded(1, 2), **SIZE)
    alone = pipe(prompts[0], image=references, generator=seeded(1), **SIZE)
    assert torch.equal(nested.codes[0], alone.codes[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_images_do_not_depend_on_their_batch(pipe, decoder):
    prompts, settings = ["a red fox", "a blue square"], {**SIZE, "guidance_scale": 2.0, **DECODERS[decoder]}
    together = pipe(prompts, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **settings)
    in_batches = pipe(prompts, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), batch_size=3, **settings)
    # Codes, since the last bit of a pixel depends on how many images are decoded together.
    assert all(torch.equal(*pair) for pair in zip(together.codes, in_batches.codes, strict=True))
    assert in_batches.num_forward_passes > together.num_forward_passes
    alone = pipe(prompts[1], generator=seeded(3), **settings)
    assert torch.equal(together.codes[2], alone.codes[0])


def test_output_types(pipe):
    outputs = {
        kind: pipe(["a red fox"] * 2, generator=seeded(1), output_type=kind, **SIZE)
        for kind in ("pil", "pt", "np", "codes")
    }
    pixels = np.stack([np.array(image) for image in outputs["pil"].images])
    assert outputs["np"].images.dtype == np.float32
    assert np.array_equal((outputs["np"].images * 255).round().astype(np.uint8), pixels)
    assert outputs["pt"].images.shape == (2, 3, SIZE["height"], SIZE["width"])
    assert torch.equal(outputs["pt"].images, torch.from_numpy(outputs["np"].images).permute(0, 3, 1, 2))
    codes = outputs["codes"].images
    assert codes.dtype == torch.long and torch.equal(codes, torch.stack(outputs["pil"].codes))
    decoded = [emu35.segments_emu35.pixels_to_pil(one) for one in pipe.model.decode_image(list(codes))]
    assert same(decoded, outputs["pil"].images)
    images, *_ = pipe(["a red fox"] * 2, generator=seeded(1), return_dict=False, **SIZE)
    assert same(images, outputs["pil"].images)


def test_codes_without_a_vision_tokenizer(make_tiny_model, tiny_processor):
    pipe = Emu35Pipeline(make_tiny_model(vision_tokenizer_config=None), tiny_processor)
    size = {"height": 2 * 16, "width": 3 * 16}
    assert pipe("a red fox", output_type="codes", **size).images.shape == (1, 2, 3)
    with pytest.raises(ValueError, match="`output_type`='pil' needs a vision tokenizer"):
        pipe("a red fox", **size)


@pytest.mark.parametrize("decoder", DECODERS)
def test_completion(pipe, decoder):
    """What is black in the mask is kept; codes with any white pixel are made anew."""
    settings = DECODERS[decoder]
    image, mask = picture(12, 20), np.zeros((12, 20))
    mask[7:, :3] = 1  # a corner of codes (1, 0) and (2, 0)
    before = pipe.model.encode_image([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1])[0]
    masks = [mask, PIL.Image.fromarray((mask * 255).astype(np.uint8)), torch.from_numpy(mask > 0)]
    outputs = [pipe("a red fox", image=image, mask_image=one, generator=seeded(7), **settings) for one in masks]
    anew = torch.zeros(3, 5, dtype=torch.bool)
    anew[1:, 0] = True
    codes = outputs[0].codes[0]
    assert torch.equal(codes[~anew], before[~anew])
    assert not torch.equal(codes, before)
    assert all(torch.equal(codes, output.codes[0]) for output in outputs)
    two = pipe(["a red fox"] * 2, image=image, mask_image=[mask, 1 - mask], generator=seeded(7, 8), **settings)
    assert torch.equal(two.codes[0], codes)
    assert not torch.equal(two.codes[1][0, 1:], before[0, 1:])


# --- while they are made ---


@pytest.mark.parametrize("decoder", DECODERS)
def test_callbacks(pipe, decoder):
    seen = []

    def look(pipe, step, t, tensors):
        seen.append((step, t, tensors["codes"].clone()))
        tensors["codes"].zero_()  # a copy
        return tensors

    output = pipe(["a red fox"] * 2, callback_on_step_end=look, generator=seeded(1), **SIZE, **DECODERS[decoder])
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3])
    assert torch.equal(seen[-1][2], torch.stack(output.codes))
    plain = pipe(["a red fox"] * 2, generator=seeded(1), **SIZE, **DECODERS[decoder])
    assert same(plain.images, output.images)
    if decoder != "dida":
        for step, _, codes in seen:
            assert (codes[:, : step + 1] >= 0).all() and (codes[:, step + 1 :] == -1).all()


def test_callbacks_of_a_greedy_sampler(pipe):
    """The steps are those of a greedy copy of the scheduler."""
    times = []
    pipe(
        "a red fox",
        callback_on_step_end=lambda pipe, step, t, tensors: times.append(t),
        image_top_k=1,
        **SIZE,
        **{**DECODERS["dida"], "num_inference_steps": 4},
    )
    assert pipe.scheduler.config.temperature > 0
    assert times == [0, 0.25, 0.5, 0.75]


def test_guidance_that_ends(pipe):
    """Without guidance from the beginning but one step on, the images are other ones, and cost fewer rows."""
    rows = []
    hook = pipe.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {**SIZE, **DECODERS["dida"], "guidance_scale": 3.0}
    whole = pipe("a red fox", generator=seeded(1), **settings)
    cut = pipe("a red fox", generator=seeded(1), guidance_cutoff=0.3, **settings)
    hook.remove()
    assert rows[-3:] == [2, 1, 1] and rows.count(2) >= 5
    assert not same(whole.images, cut.images)


def test_callbacks_of_several_sizes(pipe):
    shapes = []
    pipe(
        ["a red fox"] * 3,
        image=[picture(8, 16), picture(16, 8), picture(8, 16)],
        callback_on_step_end=lambda pipe, step, t, tensors: shapes.append((step, *tensors["codes"].shape)),
        image_area=8 * 16,
    )
    # Images of 2*4 codes, then that of 4*2 (as the processor resizes them).
    heights = {shape[1:] for shape in shapes}
    assert len(heights) == 2 and {shape[0] for shape in heights} == {1, 2}
    for shape in heights:
        assert [step for step, *rest in shapes if tuple(rest) == shape] == list(range(shape[1]))


class Stop(PipelineCallback):
    tensor_inputs = ["codes"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        pipeline._interrupt = step_index == 1
        return callback_kwargs


def test_interruption(pipe):
    stop = MultiPipelineCallbacks([Stop()])
    full = pipe("a red fox", generator=seeded(1), **SIZE)
    for decoder in ("ar", "speculative"):
        settings = {"batch_size": 1, "callback_on_step_end": stop, **SIZE, **DECODERS[decoder]}
        output = pipe(["a red fox"] * 2, generator=seeded(1, 2), **settings)
        assert [tuple(codes.shape) for codes in output.codes] == [(2, 5), (0, 0)]
        assert output.images[0].size == (5 * FACTOR, 2 * FACTOR) and output.images[1] is None
        assert decoder != "ar" or torch.equal(output.codes[0], full.codes[0][:2])
    seen = []

    def look(pipe, step, t, tensors):
        seen.append(tensors["codes"])
        return stop(pipe, step, t, tensors)

    output = pipe(["a red fox"] * 2, callback_on_step_end=look, **SIZE, **DECODERS["dida"])
    assert len(seen) == 2
    assert torch.equal(torch.stack(output.codes), seen[-1])
    assert output.images[1].size == (5 * FACTOR, 3 * FACTOR)
    assert same(pipe("a red fox", generator=seeded(1), **SIZE).images, full.images)


@pytest.mark.parametrize(("decoder", "total"), [("ar", 30), ("speculative", 30), ("dida", 3)])
def test_progress_bar(pipe, monkeypatch, decoder, total, capsys):
    bars = []
    make = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda **kwargs: bars.append(make(**kwargs)) or bars[-1])
    pipe.set_progress_bar_config(mininterval=0, ncols=80)
    pipe(["a red fox"] * 2, **SIZE, **DECODERS[decoder])
    (bar,) = bars
    assert bar.n == bar.total == total
    assert f"{total}/{total}" in capsys.readouterr().err


# --- loading, saving, moving ---


def test_the_shipped_checkpoint():
    """As in the README."""
    pipe = Emu35Pipeline.from_pretrained(emu35.TINY)
    assert not pipe.model.training and pipe.dtype == torch.bfloat16
    image = pipe("a red circle", generator=seeded(0)).images[0]
    assert image.size == (48, 48)
    edited = pipe("make the circle blue", image=image).images[0]
    assert edited.size == (48, 48) and not same([image], [edited])


@pytest.mark.skipif(not os.path.isdir(emu35.TINY_DIDA), reason="the adapter is not in this installation")
def test_the_shipped_adapter():
    """As in the README."""
    pipe = Emu35Pipeline.from_pretrained(emu35.TINY)
    pipe.load_dida_adapter(emu35.TINY_DIDA)
    output = pipe("a red circle", num_inference_steps=8, generator=seeded(0))
    assert output.images[0].size == (48, 48)
    assert output.num_forward_passes == 1 + 8


def test_plain_checkpoints(own_pipe, tmp_path):
    own_pipe.model.save_pretrained(tmp_path)
    own_pipe.processor.save_pretrained(tmp_path)
    DiDAScheduler(num_codes=48, path="mixture").save_pretrained(tmp_path)
    loaded = Emu35Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.model.vision_tokenizer.dtype == torch.float32
    assert loaded.scheduler.config.path == "mixture"
    scheduler = DiDAScheduler(num_codes=48)
    loaded = Emu35Pipeline.from_pretrained(tmp_path, scheduler=scheduler, model=own_pipe.model)
    assert loaded.scheduler is scheduler and loaded.model is own_pipe.model
    with pytest.raises(OSError, match="nowhere"):
        Emu35Pipeline.from_pretrained("./nowhere")


@pytest.mark.parametrize("loader", [Emu35Pipeline, DiffusionPipeline])
def test_save_and_load(own_pipe, tmp_path, loader):
    own_pipe.scheduler = DiDAScheduler.from_config(own_pipe.scheduler.config, path="mixture", time_shift=0.5)
    own_pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is Emu35Pipeline
    assert loaded.scheduler.config.time_shift == 0.5
    for decoder in DECODERS.values():
        first, second = (one("a red fox", generator=seeded(1), **SIZE, **decoder) for one in (own_pipe, loaded))
        assert same(first.images, second.images)
    half = loader.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.vision_tokenizer.dtype == torch.float32


def test_loading_from_the_hub(own_pipe, adapter, tmp_path):
    """Out of its cache: the checkpoint of a model, and a saved pipeline with an adapter."""

    def folder(name):
        repository = tmp_path / f"models--somebody--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return repository / "snapshots" / ("0" * 40)

    checkpoint = folder("checkpoint")
    own_pipe.model.save_pretrained(checkpoint)
    own_pipe.processor.save_pretrained(checkpoint)
    own_pipe.load_dida_adapter(adapter)
    own_pipe.save_pretrained(folder("pipeline"))
    for name, adapters in (("checkpoint", set()), ("pipeline", {"dida"})):
        loaded = Emu35Pipeline.from_pretrained(f"somebody/{name}", cache_dir=tmp_path, local_files_only=True)
        assert set(getattr(loaded.model, "peft_config", {})) == adapters
        first, second = (
            pipe("a red fox", generator=seeded(1), image_decoder="ar", **SIZE) for pipe in (own_pipe, loaded)
        )
        assert same(first.images, second.images)


def test_adapted_checkpoints(own_pipe, tmp_path):
    """A model that needs no adapter has a scheduler of its own."""
    own_pipe.model.config.dida_adapted = True
    own_pipe.model.save_pretrained(tmp_path)
    own_pipe.processor.save_pretrained(tmp_path)
    DiDAScheduler(num_codes=48, path="absorbing").save_pretrained(tmp_path)
    loaded = Emu35Pipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.path == "absorbing"
    assert Emu35Pipeline(loaded.model, loaded.processor).scheduler.config.path == "absorbing"
    assert loaded("a red fox", num_inference_steps=3, **SIZE).num_forward_passes == 1 + 3


def test_from_pipe_leaves_the_dtype(own_pipe):
    own_pipe.to(torch.bfloat16)
    other = Emu35Pipeline.from_pipe(own_pipe, scheduler=DiDAScheduler(num_codes=48, path="absorbing"))
    assert other.model is own_pipe.model and own_pipe.dtype == torch.bfloat16
    assert (own_pipe.scheduler.config.path, other.scheduler.config.path) == ("metric", "absorbing")


def test_moving_keeps_what_must_be_exact(own_pipe):
    model = own_pipe.model
    frequencies = model.model.rotary_emb.inv_freq.clone()
    weights = copy.deepcopy(model.vision_tokenizer.state_dict())
    assert own_pipe.to("cpu", torch.bfloat16) is own_pipe
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.vision_tokenizer.state_dict().items())
    own_pipe.to("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model.vision_tokenizer.dtype == torch.float32


def test_offloading(own_pipe, monkeypatch):
    """Everything that computes comes after the hook that brings the model in."""
    references, mask = picture(), np.ones((16, 16))
    calls = [
        {"image": references, "prompt": "a red fox"},
        {"image": references, "mask_image": mask, "prompt": "a red fox"},
    ]
    expected = [own_pipe(generator=seeded(1), **call).images for call in calls]
    events = []
    pre_forward, encode = CpuOffload.pre_forward, type(own_pipe.model).encode_image
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda self, *args, **kw: events.append("in") or pre_forward(self, *args, **kw)
    )
    monkeypatch.setattr(
        type(own_pipe.model), "encode_image", lambda self, *args: events.append("encode") or encode(self, *args)
    )
    own_pipe.enable_model_cpu_offload(device="cpu")
    for call, images in zip(calls, expected, strict=True):
        events.clear()
        assert same(own_pipe(generator=seeded(1), **call).images, images)
        assert events[0] == "in" and "encode" in events


# --- schedulers and adapters ---


def test_schedulers_are_swapped(pipe):
    settings, used = {**SIZE, **DECODERS["dida"]}, []
    inputs = pipe.processor(text="a red fox", task="t2i")
    for path in ("metric", "mixture", "absorbing"):
        pipe.scheduler = DiDAScheduler.from_config(pipe.scheduler.config, path=path)
        output = pipe("a red fox", generator=seeded(1), **settings)
        scheduler = DiDAScheduler(num_codes=48, path=path)
        expected = pipe.model.generate(
            **inputs, generation_mode="image", scheduler=scheduler, generator=seeded(1), **settings
        )
        assert same(output.images, expected.images[0])
        used.append(output.codes[0].tolist())
    assert used[0] != used[1] != used[2]


def test_dida_adapter(own_pipe, adapter, tmp_path):
    before = own_pipe("a red fox", generator=seeded(1), **SIZE)
    unadapted = own_pipe("a red fox", generator=seeded(1), **SIZE, **DECODERS["dida"])
    own_pipe.load_dida_adapter(adapter)
    assert own_pipe.scheduler.config.path == "absorbing"
    own_pipe.scheduler = DiDAScheduler.from_config(own_pipe.scheduler.config, path="metric")
    adapted = own_pipe("a red fox", generator=seeded(1), num_inference_steps=3, **SIZE)  # the default decoder now
    assert adapted.num_forward_passes == unadapted.num_forward_passes == 1 + 3
    assert not torch.equal(adapted.codes[0], unadapted.codes[0])
    assert own_pipe.num_timesteps == 3
    assert same(own_pipe("a red fox", image_decoder="ar", generator=seeded(1), **SIZE).images, before.images)
    own_pipe.save_pretrained(tmp_path)
    loaded = Emu35Pipeline.from_pretrained(tmp_path)
    for pipe in (own_pipe, loaded):
        again = pipe("a red fox", generator=seeded(1), num_inference_steps=3, **SIZE)
        assert torch.equal(again.codes[0], adapted.codes[0])
        assert same(pipe("a red fox", image_decoder="ar", generator=seeded(1), **SIZE).images, before.images)
    # `model` has the model itself; a later save takes the adapters away.
    plain = emu35.Emu35ForConditionalGeneration.from_pretrained(tmp_path / "model")
    Emu35Pipeline(plain, own_pipe.processor).save_pretrained(tmp_path)
    assert not hasattr(Emu35Pipeline.from_pretrained(tmp_path).model, "peft_config")


def test_lora_weights(own_pipe, adapter, model, tmp_path):
    def draw(pipe, **settings):
        return pipe("a red fox", generator=seeded(1), **SIZE, **settings).codes[0]

    steps = {"num_inference_steps": 3}
    own_pipe.load_dida_adapter(adapter)
    dida, ar = draw(own_pipe, **steps), draw(own_pipe, image_decoder="ar")
    lora = save_adapter(model, tmp_path / "lora", seed=1)
    own_pipe.load_lora_weights(lora, adapter_name="style")
    styled = draw(own_pipe, image_decoder="ar")
    assert not torch.equal(styled, ar)
    own_pipe.save_pretrained(tmp_path / "pipe")
    loaded = Emu35Pipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(draw(loaded, image_decoder="ar"), styled)
    assert torch.equal(draw(loaded, **steps), draw(own_pipe, **steps))
    with pytest.raises(ValueError, match="already exists"):
        own_pipe.load_lora_weights(lora, adapter_name="style")
    own_pipe.unload_lora_weights()
    assert torch.equal(draw(own_pipe, image_decoder="ar"), ar)
    assert torch.equal(draw(own_pipe, **steps), dida)
    own_pipe.unload_lora_weights()  # nothing is left to do
    with pytest.raises(ValueError, match="Use `load_dida_adapter`"):
        own_pipe.load_lora_weights(lora, adapter_name="dida")


def test_lora_weights_of_another_model(make_tiny_model, own_pipe, tmp_path):
    before = own_pipe("a red fox", generator=seeded(1), **SIZE)
    save_adapter(make_tiny_model(hidden_size=64), tmp_path / "wide")
    save_adapter(make_tiny_model(num_hidden_layers=3), tmp_path / "deep")
    for name in ("wide", "deep"):
        with pytest.raises(ValueError, match="does not fit this model"):
            own_pipe.load_lora_weights(tmp_path / name)
        assert same(own_pipe("a red fox", generator=seeded(1), **SIZE).images, before.images)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "`prompt` must be a string or a list of strings that is not empty"),
        ({"prompt": ["a", 1]}, "`prompt` must be a string or a list of strings"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"height": 13}, "`height` must be a positive multiple of 4 pixels, got 13. Nearest: 12 or 16"),
        ({"width": None}, "`height` and `width` together"),
        ({"output_type": "jpg"}, "`output_type` must be one of .*'codes'.*, got 'jpg'"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 images"),
        ({"num_inference_steps": 0, "image_decoder": "dida"}, "`num_inference_steps` must be a whole number of at l"),
        ({"num_inference_steps": 4}, "`image_decoder`='dida', but this call uses 'ar'.*`load_dida_adapter`"),
        ({"image_decoder": "dida"}, "no adapter"),
        ({"image_decoder": "diffusion"}, "`image_decoder` must be one of"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0"),
        ({"image_temprature": 1.0}, "Did you mean `image_temperature`"),
        ({"max_new_tokens": 4}, "`max_new_tokens` is not for the pipeline"),
        ({"prompt": ["a", "b"], "image": picture()}, "`prompt` is a list of 2, so `image` must be .* got one image"),
        ({"prompt": ["a", "b"], "image": [picture()] * 3}, "got 3 items"),
        ({"prompt": ["a", "b"], "image": 5}, "got int"),
        ({"guidance_cutoff": 2.0}, "`guidance_cutoff` must lie in"),
        ({"prompt": ["a", "b"], "image": [picture(), None]}, "needs an image"),
        ({"mask_image": np.ones((16, 16))}, "`mask_image` needs the `image`"),
        ({"image": picture(), "mask_image": np.ones((16, 16))}, "Leave out height, width"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"may have \['codes'\], got \['latents'\]"),
    ],
)  # fmt: skip
def test_bad_input(pipe, monkeypatch, arguments, message):
    arguments = {"prompt": "a red fox", **SIZE, **arguments}
    monkeypatch.setattr(pipe.model.model, "forward", lambda *args, **kwargs: pytest.fail("a pass was made"))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(14, 16), np.ones((14, 16)), r"`image\[0\]` has 14\*16 pixels; .* multiples of 4"),
        (picture(), np.ones((14, 16)), r"`mask_image\[0\]` must be .* \(14, 16\)"),
        (picture(), np.ones((16, 16, 3)), r"\(16, 16, 3\)"),
        (picture(), np.ones((12, 16)), r"`mask` has 3\*4 codes, but `image` 4\*4"),
        (picture(), np.zeros((16, 16)), "nothing is left to make"),
        ([picture()] * 2, np.ones((16, 16)), "`image` has 2 items for 1 prompts"),
    ],
)
def test_bad_masks(pipe, image, mask, message):
    with pytest.raises(ValueError, match=message):
        pipe("a red fox", image=image, mask_image=mask)


@pytest.mark.parametrize("returned", [{"codes": torch.zeros(1, 3, 5)}, {"codes": None}])
def test_codes_cannot_be_replaced(pipe, returned):
    with pytest.raises(ValueError, match="`codes`, but it cannot be replaced"):
        pipe("a red fox", callback_on_step_end=lambda *args: returned, **SIZE)


def test_a_scheduler_of_another_codebook(pipe):
    pipe.scheduler = DiDAScheduler(num_codes=50)
    with pytest.raises(ValueError, match="`num_codes`=50, but the model 48"):
        pipe("a red fox", **SIZE, **DECODERS["dida"])


def test_images_of_any_kind_are_references(pipe):
    image = picture()
    kinds = [image, np.array(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)]
    assert Emu35ImageProcessor(factor=FACTOR)(images=kinds)["image_sizes"].shape == (3, 2)
    outputs = [pipe("a red fox", image=one, generator=seeded(1), **SIZE).images for one in kinds]
    assert same(outputs[0], outputs[1]) and same(outputs[0], outputs[2])
