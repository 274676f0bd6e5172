"""Rewards over CLIP features, on a tiny random CLIP that is built here."""

import math
from functools import cache

import pytest
import torch
from emu35.training.rewards import (
    AestheticScore,
    ClipEncoder,
    ClipSimilarity,
    NarrativeConsistency,
    Preservation,
    RewardMix,
)
from emu35.training.rewards.clip import as_encoder
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved checkpoint: 2 layers, features of 12 numbers, 4 x 4 patches."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [])
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_factor": 4.0,
    }
    text = {"vocab_size": len(words), "max_position_embeddings": 20, "eos_token_id": len(words) - 1, **layers}
    vision = {"image_size": SIZE, "patch_size": 4, **layers}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return ClipEncoder(folder, batch_size=2)


def picture(color, size=(SIZE, SIZE)):
    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).ellipse([2, 2, 9, 9], fill="white")
    return image


RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")


@cache
def load(folder):
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


@torch.no_grad()
def plain_features(folder, images=None, text=None):
    """As transformers' own example computes them, one by one."""
    model, processor = load(folder)
    if text is not None:
        inputs = processor(text=[text], return_tensors="pt", truncation=True, max_length=20)
        features = model.get_text_features(**inputs).pooler_output
    else:
        pixels = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
        features = torch.cat([model.get_image_features(one).pooler_output for one in pixels])
    return features / features.norm(dim=-1, keepdim=True)


def ask(reward, images, prompts=None, **columns):
    prompts = prompts or ["a red circle"] * len(images)
    return reward(prompts, [""] * len(prompts), images=images, **columns)


# ------------------------------------------------------------------------------------------------------ text and image


def test_similarity_is_the_scaled_cosine(folder, encoder):
    texts = ["a red circle", "something else entirely, which goes on for longer than the text model reads"]
    images = plain_features(folder, [RED, BLUE])
    cosines = [(images @ plain_features(folder, text=text)[0]).tolist() for text in texts]
    assert all(-0.99 < cosine < 0.99 for row in cosines for cosine in row)

    def reward(cosine):
        return min(1.0, 2.5 * max(0.0, cosine))

    expected = [reward(cosines[0][0]), sum(map(reward, cosines[1])) / 2, 0.0]
    values = ask(ClipSimilarity(encoder), [[RED], [RED, BLUE], []], [*texts, texts[0]])
    assert values == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in values}) > 1
    lower = ask(ClipSimilarity(encoder, scale=0.5), [[RED]])
    assert lower == [pytest.approx(0.5 * max(0.0, cosines[0][0]), abs=1e-5)]


def test_similarity_to_a_column(folder, encoder):
    reward = ClipSimilarity(encoder, column="caption", scale=0.5)
    by_column = ask(reward, [[RED], [RED]], ["p", "q"], caption=["a blue square", None])
    assert by_column == [*ask(ClipSimilarity(encoder, scale=0.5), [[RED]], ["a blue square"]), None]
    assert reward.num_failures == 0


def test_a_picture_in_gray_is_read_like_any_other(encoder):
    gray = Image.new("L", (SIZE, SIZE), 120)
    assert ask(ClipSimilarity(encoder), [[gray]]) == ask(ClipSimilarity(encoder), [[gray.convert("RGB")]])


def test_a_broken_sample_is_none_and_the_others_are_scored(encoder, monkeypatch):
    reward, whole = ClipSimilarity(encoder), encoder.text_features

    def fail(texts):
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return whole(texts)

    monkeypatch.setattr(encoder, "text_features", fail)
    values = ask(reward, [[RED], [RED], [BLUE]], ["a", "bad", "b"])
    assert values == [*ask(reward, [[RED]], ["a"]), None, *ask(reward, [[BLUE]], ["b"])]
    assert reward.num_failures == 1


def test_rewards_of_one_path_share_one_model(folder):
    one, other = ClipSimilarity(str(folder)), NarrativeConsistency(str(folder))
    assert one.encoder is other.encoder is as_encoder(str(folder))
    assert one.encoder.model == str(folder)  # nothing is loaded yet
    RewardMix([one, other]).load()
    assert isinstance(one.encoder.model, CLIPModel)
    assert not any(p.requires_grad for p in one.encoder.model.parameters())


def test_a_model_needs_its_processor(encoder):
    with pytest.raises(ValueError, match="`processor` is needed when `model` is a model"):
        ClipEncoder(encoder.load())
    again = ClipEncoder(encoder.load(), encoder.processor)
    assert torch.equal(again.image_features([RED]), encoder.image_features([RED]))


# ---------------------------------------------------------------------------------------------------------- aesthetics


def test_aesthetic_is_linear_in_the_features(folder, encoder, tmp_path):
    weight, bias = torch.linspace(-3, 3, 12), torch.tensor([5.0])
    save_file({"weight": weight[None], "bias": bias}, tmp_path / "head.safetensors")
    reward = AestheticScore(tmp_path / "head.safetensors", encoder)
    one, other = (plain_features(folder, [RED, BLUE]) @ weight + 5).tolist()
    assert ask(reward, [[RED], [RED, BLUE], []]) == pytest.approx([one, (one + other) / 2, 1.0], abs=1e-5)
    assert 1 < one < 10 and reward.range == (1.0, 10.0)
    save_file({"weight": weight, "bias": torch.tensor([50.0])}, tmp_path / "high.safetensors")
    assert ask(AestheticScore(tmp_path / "high.safetensors", encoder), [[RED]]) == [10.0]


def test_a_head_for_other_features_is_refused(encoder, tmp_path):
    save_file({"weight": torch.zeros(768), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"must hold `weight` of 12 numbers.*it holds \{'bias': 1, 'weight': 768\}"):
        ask(AestheticScore(tmp_path / "head.safetensors", encoder), [[RED]])
    with pytest.raises(FileNotFoundError):
        AestheticScore(tmp_path / "none.safetensors", encoder).load()


# ------------------------------------------------------------------------------------------------------------- stories


def test_narrative_is_the_mean_cosine_and_copies_are_nothing(folder, encoder):
    features = plain_features(folder, [RED, BLUE, GREEN])
    rb, rg, bg = (max(0.0, float(features[i] @ features[j])) for i, j in ((0, 1), (0, 2), (1, 2)))
    reward = NarrativeConsistency(encoder, copy=0.9999)
    assert max(rb, rg, bg) < 0.9999
    values = ask(reward, [[RED, BLUE], [RED, BLUE, GREEN], [RED, RED.copy()], [RED, RED, BLUE], [RED], []])
    expected = [rb, (rb + rg + bg) / 3, 0.0, 2 * rb / 3, 0.0, 0.0]
    assert values == pytest.approx(expected, abs=1e-5)
    assert rb > 0 and ask(NarrativeConsistency(encoder, copy=rb - 1e-3), [[RED, BLUE]]) == [0.0]


# -------------------------------------------------------------------------------------------------------- preservation


def mask_of(box, size=(SIZE, SIZE)):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def test_preservation_by_pixels():
    source = Image.new("RGB", (8, 4), (100, 100, 100))
    inside, half, far = source.copy(), source.copy(), Image.new("RGB", (8, 4), (250, 250, 250))
    inside.paste((255, 0, 0), (0, 0, 4, 4))  # the left half, which may change
    half.paste((116, 100, 84), (4, 0, 6, 4))  # a quarter of the picture, by (16 + 0 + 16) / 3 levels
    mask = mask_of([0, 0, 3, 3], (8, 4))
    columns = {"reference_images": [[source]] * 7, "edit_mask": [mask] * 6 + [None]}
    images = [[source], [inside], [half], [far], [inside, far], [], [source]]
    expected = [1.0, 1.0, 1 - 16 / 3 / 64, 0.0, 0.5, 0.0, None]
    assert ask(Preservation(), images, **columns) == pytest.approx(expected)
    # of the right half, half is off by 32 / 3 levels
    assert ask(Preservation(tolerance=16 / 3), images[2:3], reference_images=[[source]], edit_mask=[mask]) == [
        pytest.approx(0.0)
    ]


def test_a_mask_may_be_an_array_and_must_fit():
    source = Image.new("RGB", (8, 4), "gray")
    reward = Preservation()
    masks = [[[True] * 4 + [False] * 4] * 4, [[False] * 4] * 4, [[True] * 8] * 4]
    values = ask(reward, [[source]] * 3, reference_images=[[source]] * 3, edit_mask=masks)
    assert values == [1.0, None, None]  # the second has another size, the third leaves nothing to keep
    assert reward.num_failures == 1


def test_source_and_mask_may_be_files_and_the_source_may_stand_in_the_prompt(tmp_path):
    source, mask = Image.new("RGB", (8, 4), (100, 100, 100)), mask_of([0, 0, 3, 3], (8, 4))
    source.save(tmp_path / "source.png")
    mask.save(tmp_path / "mask.png")
    edited = Image.new("RGB", (8, 4), (116, 116, 116))
    paths = {"reference_images": [[str(tmp_path / "source.png")]], "edit_mask": [tmp_path / "mask.png"]}
    assert ask(Preservation(), [[edited]], **paths) == [0.75]
    said = [{"type": "text", "text": "brighter"}, {"type": "image", "path": str(tmp_path / "source.png")}]
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    messages = [[*earlier, {"role": "user", "content": said}]] * 2
    reward = Preservation(column=None)
    assert ask(reward, [[edited], []], messages=messages, edit_mask=[mask] * 2) == [0.75, 0.0]
    with pytest.raises(ValueError, match="needs the column `messages`"):
        ask(reward, [[edited]], edit_mask=[mask])


def test_an_edit_of_another_size_is_resized():
    source = Image.new("RGB", (8, 4), (10, 20, 30))
    value = ask(
        Preservation(),
        [[source.resize((16, 8))]],
        reference_images=[[source]],
        edit_mask=[mask_of([0, 0, 1, 1], (8, 4))],
    )
    assert value == [1.0]


def test_preservation_by_features(encoder):
    edited = RED.copy()
    edited.paste((0, 0, 0), (8, 8, 16, 16))
    mask = mask_of([8, 8, 15, 15])
    before, after = encoder.patch_features([RED, edited])
    assert before.shape == (4, 4, 16)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[2:, 2:] = False
    expected = (before * after).sum(-1)[kept].mean().item()
    columns = {"reference_images": [[RED]], "edit_mask": [mask]}
    assert ask(Preservation(encoder), [[RED]], **columns) == [pytest.approx(1.0, abs=1e-6)]
    assert ask(Preservation(encoder), [[edited]], **columns) == [pytest.approx(expected, abs=1e-6)]
    assert 0 < expected < 1 - 1e-4
    # A mask that touches every patch leaves none to compare.
    grid = [[(x % 4 == 0) for x in range(SIZE)] for _ in range(SIZE)]
    assert ask(Preservation(encoder), [[RED]], reference_images=[[RED]], edit_mask=[grid]) == [None]


def test_patches_keep_their_places_in_wide_pictures(encoder):
    """CLIP's own preprocessing would crop both ends away."""
    wide = Image.new("RGB", (4 * SIZE, SIZE), "blue")
    marked = wide.copy()
    marked.paste((255, 0, 0), (0, 0, SIZE, SIZE))
    before, after = encoder.patch_features([wide, marked])
    pixels = encoder.processor(images=marked.resize((SIZE, SIZE)), return_tensors="pt")["pixel_values"]
    assert pixels[0, 0, :, :4].mean() > pixels[0, 0, :, 4:].mean() + 1
    assert (before - after).norm(dim=-1).mean() > 1e-3


def test_bad_tolerances_are_refused():
    for value in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`tolerance` must be positive"):
            Preservation(tolerance=value)
