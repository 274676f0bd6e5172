"""The release's own numbers: logits, scores after every filter, and whole greedy answers."""

import json
from pathlib import Path

import pytest
import torch
from emu35 import Emu35Config, Emu35ForConditionalGeneration
from emu35.generation_loop_emu35 import allowed_size_tokens
from emu35.image_tokens_emu35 import find_images
from emu35.sampling_emu35 import Sampler, guide
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "release_lm"
FORWARD_CASES = [
    *(
        f"lm_tiny.{case}"
        for case in ("text_en", "text_zh", "mix", "long300", "pad_id_unmasked", "leftpad_pos", "rightpad")
    ),
    *(f"lm_medium.{case}" for case in ("short", "long", "pad_id_unmasked", "leftpad_pos", "rightpad")),
]
ROPE_OVERRIDES = {
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12},
}
GENERATION = json.loads((FIXTURES / "generation.json").read_text())["cases"]
SCORES = json.loads((FIXTURES / "scores.json").read_text())


def load(name, **kwargs):
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager", **kwargs}
    model = Emu35ForConditionalGeneration.from_pretrained(FIXTURES / name, **kwargs).eval()
    model.config.visual_loss_weight = 1.0  # the release's loss has no weights
    return model


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in ("lm_tiny", "lm_medium")}


@pytest.fixture(scope="module")
def forward_reference():
    return load_file(FIXTURES / "lm_forward.safetensors")


def inputs_of(reference, case):
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    return {name: reference[f"{case}.{name}"].long() for name in names if f"{case}.{name}" in reference}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", FORWARD_CASES)
def test_logits_equal_the_release(models, forward_reference, case, attention):
    model = models[case.split(".")[0]]
    inputs = inputs_of(forward_reference, case)
    labels = inputs.pop("labels", None)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    expected = forward_reference[f"{case}.logits_cols"]
    columns = forward_reference[f"{case.split('.')[0]}.columns"].long()
    stored = expected.shape[1]  # the last positions
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()[:, -stored:]
    logits = outputs.logits[:, -stored:]
    torch.testing.assert_close(logits[..., columns][mask], expected[mask], atol=2e-4, rtol=0)
    torch.testing.assert_close(
        logits.logsumexp(-1)[mask], forward_reference[f"{case}.logsumexp"][mask], atol=2e-4, rtol=0
    )
    for index, hidden_states in enumerate(outputs.hidden_states):
        if f"{case}.hidden_states.{index}" in forward_reference:
            expected = forward_reference[f"{case}.hidden_states.{index}"]
            torch.testing.assert_close(hidden_states, expected, atol=2e-4, rtol=0)
    if labels is not None:
        loss = model(**inputs, labels=labels).loss
        torch.testing.assert_close(loss.detach(), forward_reference[f"{case}.loss"][0], atol=2e-4, rtol=0)


def test_attention_weights_equal_the_release(models, forward_reference):
    model = models["lm_tiny"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(forward_reference["lm_tiny.mix.input_ids"].long(), output_attentions=True).attentions
    expected = forward_reference["lm_tiny.mix.attentions.0"]
    torch.testing.assert_close(attentions[0][:, :, -expected.shape[2] :], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ROPE_OVERRIDES)
def test_rope_scaling_equals_the_release(forward_reference, case):
    released = json.loads((FIXTURES / "lm_medium" / "config.json").read_text())
    model = load("lm_medium", config=Emu35Config.from_dict({**released, **ROPE_OVERRIDES[case]}))
    ids = forward_reference["lm_medium.short.input_ids"].long()
    with torch.no_grad():
        logits = model(ids, logits_to_keep=4).logits
    columns = forward_reference["lm_medium.columns"].long()
    torch.testing.assert_close(
        logits[..., columns], forward_reference[f"lm_medium.{case}.logits_cols"], atol=2e-4, rtol=0
    )


# --- scores: guidance, mask, temperature, top-k, top-p ---


@torch.no_grad()
def expected_next(model, case, step):
    """Our probability of every id after `step` tokens of the continuation."""
    layout = model.config.token_layout
    made = case["continuation_ids"][:step]
    images = list(find_images(made, layout))
    open_image = images[-1] if images and images[-1].end == len(made) and not images[-1].complete else None

    def logits(ids, vocabulary):
        return model(torch.tensor([ids]), logits_to_keep=1, vocabulary=vocabulary).logits[:, 0]

    if open_image is None or open_image.state == "size":
        scores = logits(case["prompt_ids"] + made, "text")
        kind = "text" if open_image is None else "image"  # sizes are drawn as visual tokens are
        sampler = Sampler(True, case[f"{kind}_temperature"], case[f"{kind}_top_k"], case[f"{kind}_top_p"])
        ids = torch.arange(scores.shape[1])
        if open_image is not None:
            ids = torch.tensor(sorted(allowed_size_tokens(made[open_image.begin + 1 :], layout)))
            scores = scores[:, ids]
    else:
        images = [token_id for image in images for token_id in made[image.begin : image.end]]
        streams = [case["prompt_ids"] + made, case["unconditional_ids"] + images]
        if case["image_cfg_scale"] is not None:
            streams.append(SCORES["full_unconditional_ids"] + made[open_image.begin :])
        if case["guidance"] == 1 and case["image_cfg_scale"] is None:
            streams = streams[:1]
        scores = guide([logits(ids, "visual") for ids in streams], case["guidance"], case["image_cfg_scale"])
        sampler = Sampler(True, case["image_temperature"], case["image_top_k"], case["image_top_p"])
        ids = torch.arange(scores.shape[1]) + layout.visual_token_offset
    probabilities, columns = sampler.probabilities(scores)
    expected = torch.zeros(model.config.text_config.vocab_size)
    expected[ids if columns is None else ids[columns[0]]] = probabilities[0]
    return expected


@pytest.mark.parametrize("case", SCORES["cases"], ids=lambda case: case["name"])
def test_filtered_scores_equal_the_release(models, case):
    model = models["lm_tiny"]
    model.set_attn_implementation("sdpa")
    checked = set()
    for step in case["steps"]:
        if step["num_finite"] == 1:
            continue  # forced by the grammar
        probabilities = expected_next(model, case, step["step"])
        kept = int((probabilities > 0).sum())
        assert abs(kept - step["num_finite"]) <= max(1, 0.005 * step["num_finite"]), step["label"]
        expected = torch.tensor(step["top_values"]) - step["logsumexp"]
        # One more or one fewer token at the border of top-p moves all of them by as much as that token weighs.
        torch.testing.assert_close(
            probabilities[step["top_ids"]].log(), expected, atol=2e-3, rtol=0, msg=step["label"]
        )
        checked.add(step["top_ids"][0] >= model.config.token_layout.visual_token_offset)
    assert checked == {False, True}


# --- whole answers ---


def generate(model, case, **changes):
    ids = torch.tensor([case["input_ids"]])
    settings = {"aspect_ratio": "auto"}
    if case["target_height"] and case["force_same_image_size"]:
        settings = {"height": 16 * case["target_height"], "width": 16 * case["target_width"]}
    elif any(image.complete for image in find_images(case["input_ids"], model.config.token_layout)):
        settings = {"aspect_ratio": "reference"}
    if "image_cfg_scale" in case:
        settings["negative_image_prompt_ids"] = torch.tensor([case["full_unconditional_ids"]])
        settings["image_guidance_scale"] = float(case["image_cfg_scale"])
    return model.generate(
        ids,
        # transformers 4.48 took every pad id for padding when it got no mask.
        attention_mask=(ids != model.config.token_layout.pad_token_id).long(),
        negative_prompt_ids=torch.tensor([case["unconditional_ids"]]),
        generation_mode="interleaved",
        guidance_scale=case["guidance"],
        do_sample=False,
        max_new_tokens=len(case["generated_ids"]),
        return_dict_in_generate=False,
        **{**settings, **changes},
    )[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("case", GENERATION, ids=lambda case: case["name"])
def test_greedy_answers_equal_the_release(models, case):
    model = models["lm_tiny"]
    model.set_attn_implementation("sdpa")
    answer = generate(model, case)
    if case["name"] == "prompt_ends_with_eoi":
        # The release's logits processor opens its unconditional context at BOI and closes it at EOI. A prompt that
        # ends in EOI makes it add that EOI to a context without BOI, which the answer's second image then sees.
        eoi = model.config.token_layout.eoi_token_id
        same = case["generated_ids"].index(eoi) + 1
        assert answer[:same] == case["generated_ids"][:same]
        return
    assert answer == case["generated_ids"]
