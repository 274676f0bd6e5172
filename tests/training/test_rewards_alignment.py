"""The yes of a judge: a tiny LLaVA that is built here, the shipped tiny Emu3.5, and what is refused."""

import emu35
import numpy as np
import pytest
import torch
from emu35.training.rewards import RewardMix, VLMAlignment, VLMConsistency, YesNoJudge
from emu35.training.shapes import sample_scene, to_image
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<unk>", "<image>", "USER", "ASSISTANT", "yes", "Yes", "no", "No", "NO", "is", "it", "red", "blue"]
TEMPLATE = (
    "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT{% endif %}"
)
RED, BLUE = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))


def make_llava(words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, initializer_factor=4.0, **layers),
        text_config=LlamaConfig(vocab_size=len(words), initializer_range=0.5, **layers),
        image_token_index=2,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


@pytest.fixture(scope="module")
def llava():
    return make_llava()


@torch.no_grad()
def plain_probability(model, processor, image, question):
    text = f"USER <image> {question} ASSISTANT"
    probabilities = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1].softmax(-1)
    yes = probabilities[[WORDS.index(word) for word in ("yes", "Yes")]].sum()
    no = probabilities[[WORDS.index(word) for word in ("no", "No", "NO")]].sum()
    return (yes / (yes + no)).item()


def test_probability_is_that_of_the_first_token_over_all_spellings(llava):
    judge = YesNoJudge(*llava)
    values = [judge.probability(image, "is it red") for image in (RED, BLUE)]
    assert values == pytest.approx([plain_probability(*llava, image, "is it red") for image in (RED, BLUE)], abs=1e-6)
    assert min(values) > 0.001 and max(values) < 0.999 and abs(values[0] - values[1]) > 1e-4


def test_alignment_is_the_mean_over_the_images(llava):
    reward = VLMAlignment(YesNoJudge(*llava), question="is it {prompt}")
    red, blue = (plain_probability(*llava, image, "is it blue") for image in (RED, BLUE))
    values = reward([" blue"] * 3, [""] * 3, images=[[RED], [RED, BLUE], []])
    assert values == pytest.approx([red, (red + blue) / 2, 0.0], abs=1e-6)
    by_column = VLMAlignment(YesNoJudge(*llava), question="is it {prompt}", column="wanted")
    assert by_column(["red", "red"], ["", ""], images=[[RED]] * 2, wanted=["blue", None]) == [values[0], None]


def test_a_judge_of_the_users_own():
    class Judge:
        def load(self):
            self.asked = []

        def probability(self, image, question):
            self.asked.append(question)
            return 0.25

    judge = Judge()
    assert RewardMix([VLMAlignment(judge)])(["a red fox"], [""], images=[[RED]]) == [3.25]
    assert judge.asked == ['Does this image show "a red fox"? Answer yes or no.']


def test_consistency_is_the_mean_over_neighbouring_images():
    class Judge:
        asked = []

        def load(self):
            pass

        def probability(self, images, question):
            self.asked.append(([image.getpixel((0, 0))[2] for image in images], question))
            return 0.75 if images[0] is images[1] else 0.25

    reward = VLMConsistency(Judge(), question="one story of {prompt}?")
    values = reward([" a fox"] * 3, [""] * 3, images=[[RED, BLUE, BLUE], [RED], []])
    assert values == [0.5, 0.0, 0.0]
    assert Judge.asked == [([0, 255], "one story of a fox?"), ([255, 255], "one story of a fox?")]
    assert RewardMix([reward])(["p"], [""], images=[[RED, BLUE]]) == [3.25]


def test_emu35_compares_two_images():
    reward = VLMConsistency(emu35.TINY, question="is there a red circle?")
    pictures = [to_image(sample_scene(np.random.default_rng(seed), 2, held_out=False)) for seed in range(2)]
    (value,) = reward(["p"], [""], images=[pictures])
    assert reward.num_failures == 0 and 0 <= value <= 1
    one = reward.judge.probability(pictures[0], "is there a red circle?")
    assert value != one  # the second was looked at, too


def test_emu35_serves():
    """It knows what is in a picture of its world: nearly sure of the truth, nearly sure of the contrary."""
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, 2, held_out=False) for _ in range(4)]
    reward = VLMAlignment(emu35.TINY, question="is there {prompt}?")
    assert reward.judge.model == emu35.TINY  # nothing is loaded yet
    reward.load()
    prompts, right = [], []
    for scene in scenes:
        there = {o.color for o in scene.objects}
        prompts += [f"a {scene.objects[0].color} {scene.objects[0].shape}"]
        prompts += [f"a {next(c for c in ('red', 'green', 'blue') if c not in there)} {scene.objects[0].shape}"]
        right += [1, 0]
    images = [[to_image(scene)] for scene in scenes for _ in range(2)]
    values = reward(prompts, [""] * 8, images=images)
    assert reward.num_failures == 0
    assert all(0 <= value <= 1 for value in values)
    assert sum(abs(value - truth) < 0.1 for value, truth in zip(values, right, strict=True)) >= 7


def test_bad_judges_are_refused(llava):
    with pytest.raises(ValueError, match="`processor` is needed when `model` is a model"):
        YesNoJudge(llava[0])
    with pytest.raises(ValueError, match=r"`question` must say where the text of the prompt goes, by \{prompt\}"):
        VLMAlignment(YesNoJudge(*llava), question="is it good?")
    with pytest.raises(ValueError, match="cannot tell them apart by the first token"):
        YesNoJudge(*make_llava([word for word in WORDS if word.lower() != "no"])).load()
