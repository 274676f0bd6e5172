"""Conversations with images on both sides, with the shipped tiny model: what is said goes back in token for token."""

import emu35
import pytest
import torch
from emu35 import GlobalThought, ImageThought, Text
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

SIDE = 48  # pixels of a picture of the tiny model: 6*6 codes


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(emu35.TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(emu35.TINY)


def picture(color="navy"):
    image = Image.new("RGB", (SIDE, SIDE), color)
    image.paste("yellow", (4, 4, 12, 12))
    return image


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def assistant(content):
    return {"role": "assistant", "content": content}


def rows(inputs, name="input_ids"):
    mask = "attention_mask" if name == "input_ids" else name.removesuffix("ids") + "attention_mask"
    return [ids[kept.bool()].tolist() for ids, kept in zip(inputs[name], inputs[mask], strict=True)]


def real_ids(model, inputs):
    """One row with codes in place of placeholders."""
    resolved = model.resolve_image_tokens(input_ids=inputs["input_ids"], pixel_values=inputs.get("pixel_values"))
    return resolved["input_ids"][0].tolist()


def answer_ids(output, row=0):
    return output.sequences[row, output.answer_start[row] :]


@pytest.fixture(scope="module")
def odd_answer(processor):
    """An answer that no text gives back: odd splits into tokens, white space between images, thoughts."""
    layout = processor.token_layout
    spelled = [i for letter in " red" for i in processor._encode_text(letter)]
    assert len(spelled) > len(processor._encode_text(" red"))
    space = processor._encode_text("\n")
    code = layout.visual_token_offset
    image = layout.image_token_ids([[code + 6 * row + column for column in range(6)] for row in range(6)])
    ids = [layout.bog_token_id, *spelled, layout.eog_token_id, *spelled, *image, *space]
    ids += [layout.boc_token_id, *spelled, layout.eoc_token_id, *image, *space]
    return [*ids, layout.ess_token_id, layout.eos_token_id]


class TestRoundTrip:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_next_prompt_continues_the_sequence(self, model, processor, seed):
        """Whatever the model writes, however hot: prompt + answer + next turn are the next prompt, id for id."""
        messages = [user("what color is the square?", picture())]
        hot = {
            "temperature": 3.0,
            "top_k": 0,
            "generation_mode": "interleaved",
            "max_new_tokens": 120,
            "max_images": 1,
        }
        sequence = real_ids(model, processor.apply_chat_template(messages, task="chat"))
        for turn, text in enumerate(("a red circle", "how many objects?")):
            inputs = processor.apply_chat_template(messages, task="chat")
            generator = torch.Generator().manual_seed(10 * seed + turn)
            output = model.generate(**inputs, **hot, generator=generator)
            answer = answer_ids(output).tolist()
            sequence += answer
            closing = [processor.token_layout.ess_token_id, processor.token_layout.eos_token_id]
            sequence += closing if closing[1] not in answer else []
            messages += [assistant(answer_ids(output)), user(text)]
            following = processor.apply_chat_template(messages, task="chat")
            ids = real_ids(model, following)
            assert ids[: len(sequence)] == sequence
            said = processor._encode_text(f" USER: {text} ASSISTANT: ")
            assert ids[len(sequence) :] == [*said, processor.token_layout.bss_token_id]
            assert len(following["pixel_values"]) == 1  # the answer's images are codes already
            sequence = ids

    def test_ids_stay_as_they_are(self, processor, odd_answer):
        inputs = processor.apply_chat_template([user("red"), assistant(odd_answer), user("blue")], task="story")
        ids = rows(inputs)[0]
        begin = ids.index(processor.token_layout.bss_token_id) + 1
        assert ids[begin : begin + len(odd_answer)] == odd_answer
        for same in (torch.tensor(odd_answer), torch.tensor(odd_answer).numpy(), tuple(odd_answer)):
            again = processor.apply_chat_template([user("red"), assistant(same), user("blue")], task="story")
            assert rows(again)[0] == ids

    def test_ends_of_answers(self, processor, odd_answer):
        layout = processor.token_layout
        expected = processor.apply_chat_template([user("a"), assistant(odd_answer), user("b")])["input_ids"]
        for ids in (odd_answer[:-1], odd_answer[:-2], odd_answer + [layout.pad_token_id] * 3):
            found = processor.apply_chat_template([user("a"), assistant(ids), user("b")])["input_ids"]
            assert torch.equal(found, expected)
        # An answer that ended without ESS stays without it.
        without = [*odd_answer[:-2], layout.eos_token_id]
        ids = rows(processor.apply_chat_template([user("a"), assistant(without), user("b")]))[0]
        assert ids[: ids.index(layout.eos_token_id)][-len(without) + 1 :] == without[:-1]

    def test_segments_remember_their_ids(self, processor, odd_answer):
        messages = [user("red"), assistant(odd_answer), user("blue")]
        expected = processor.apply_chat_template(messages, task="chat")["input_ids"]
        segments = processor.decode_multimodal(odd_answer)
        segments.ids = odd_answer
        messages[1] = assistant(segments)
        assert torch.equal(processor.apply_chat_template(messages, task="chat")["input_ids"], expected)
        segments[1].text = " blue"  # changed by the caller: what they say now counts, not what they were
        changed = processor.apply_chat_template(messages, task="chat", tokenize=False)
        assert changed.count(" blue<") == 1 and not torch.equal(
            processor.apply_chat_template(messages, task="chat")["input_ids"], expected
        )

    def test_segments_dicts_and_strings(self, model, processor):
        """Ways to give the same answer, where its text has one spelling."""
        inputs = processor(text="a small red circle above a large blue square", task="t2i")
        output = model.generate(**inputs, generation_mode="image", do_sample=False)
        image = processor.post_process_multimodal_output(output)[0][0]
        as_segments = [GlobalThought([Text("red")]), Text(" circle"), ImageThought("blue"), image]
        as_dicts = [
            {"type": "global_thought", "text": "red"},
            {"type": "text", "text": " circle"},
            {"type": "image_thought", "text": "blue"},
            image,
        ]
        ways = [
            processor.apply_chat_template([user("a"), assistant(content), user("b")], task="chat")
            for content in (as_segments, as_dicts)
        ]
        assert torch.equal(ways[0]["input_ids"], ways[1]["input_ids"]) and "pixel_values" not in ways[0]
        # Pixels are encoded anew; this tokenizer restores the codes of its own pictures only nearly.
        pixels = processor.apply_chat_template(
            [user("a"), assistant([{"type": "image", "image": image.image}]), user("b")], task="chat"
        )
        assert len(pixels["pixel_values"]) == 1

    def test_pixels_without_codes_are_encoded(self, processor):
        image = emu35.Image(torch.empty(0, 0, dtype=torch.long), picture())
        inputs = processor.apply_chat_template([user("a"), assistant([image]), user("b")], task="chat")
        assert inputs["image_sizes"].tolist() == [[SIDE, SIDE]]


class TestChat:
    def test_understanding_and_making_in_one_conversation(self, model, processor):
        messages = [user("what color is the square?", picture())]
        answer = model.generate(
            **processor.apply_chat_template(messages, task="chat"),
            task="chat",
            generation_mode="text",
            do_sample=False,
        )
        assert processor.post_process_multimodal_output(answer)[0].text.strip()
        messages += [assistant(answer_ids(answer)), user("a small red circle")]
        inputs = processor.apply_chat_template(messages, task="chat")
        output = model.generate(**inputs, task="chat", generation_mode="image", do_sample=False)
        assert [image.size for image in output.images[0]] == [(SIDE, SIDE)]
        messages += [assistant(processor.post_process_multimodal_output(output)[0]), user("what color is the circle?")]
        inputs = processor.apply_chat_template(messages, task="chat")
        assert len(inputs["pixel_values"]) == 1
        text = processor.decode(inputs["input_ids"][0])
        assert text.count("<|image start|>") == 2 and text.count(" USER: ") == 3

    def test_template(self, processor):
        image = "<|image start|>"
        text = processor.apply_chat_template([user("red", picture()), assistant("yes"), user("blue")], tokenize=False)
        assert text.startswith(f"<|extra_203|>You are a helpful assistant. USER: {image}")
        assert "<|image end|> red ASSISTANT: <|extra_100|>yes<|extra_101|><|extra_204|> USER: blue ASSISTANT: " in text
        vqa = processor(text="red", images=picture(), task="vqa")["input_ids"]
        assert torch.equal(processor(text="red", images=picture(), task="chat")["input_ids"], vqa)

    def test_default_task(self, processor):
        dialogue = [user("red"), assistant("yes"), user("blue")]
        default = processor.apply_chat_template(dialogue)["input_ids"]
        assert torch.equal(default, processor.apply_chat_template(dialogue, task="chat")["input_ids"])
        one = processor.apply_chat_template(dialogue[:1])["input_ids"]
        assert torch.equal(one, processor(text="red", task="t2i")["input_ids"])
        # One task for all rows of a batch.
        batch = processor.apply_chat_template([dialogue[:1], dialogue], tokenize=False)
        assert all(text.startswith("<|extra_203|>You are a helpful assistant. USER: red") for text in batch)

    def test_unconditional_prompt_has_all_images_so_far(self, processor, odd_answer):
        layout = processor.token_layout
        messages = [user("red", picture()), assistant(odd_answer), user("blue", picture("black"))]
        inputs = processor.apply_chat_template(messages, task="chat")
        begin, code = layout.boi_token_id, layout.visual_token_offset
        shown = [layout.image_placeholder_token_id, code, code, layout.image_placeholder_token_id]
        for name in ("input_ids", "negative_prompt_ids"):
            ids = rows(inputs, name)[0]
            assert [ids[place + 5] for place, token_id in enumerate(ids) if token_id == begin] == shown
        text = processor.decode(rows(inputs, "negative_prompt_ids")[0], skip_special_tokens=True)
        assert text == f"You are a helpful assistant. USER: {'6*6' * 4} ASSISTANT: "
        assert processor.decode(inputs["negative_image_prompt_ids"][0]) == (
            "<|extra_203|>You are a helpful assistant. USER:  ASSISTANT: <|extra_100|>"
        )


class TestContinuing:
    @staticmethod
    def count(processor, inputs, name="negative_prompt_ids", row=0):
        """Images before BSS, and after it."""
        ids, layout = rows(inputs, name)[row], processor.token_layout
        place = ids.index(layout.bss_token_id)
        return ids[:place].count(layout.boi_token_id), ids[place:].count(layout.boi_token_id)

    def test_from_an_intermediate_state(self, processor, odd_answer):
        """Images of the unfinished answer stand in the unconditional stream where making them would have put them."""
        layout = processor.token_layout
        messages = [user("red", picture()), assistant(odd_answer[:-3])]
        inputs = processor.apply_chat_template(messages, task="vla", continue_final_message=True)
        assert rows(inputs)[0][-len(odd_answer) + 3 :] == odd_answer[:-3]
        assert rows(inputs)[0][-1] == layout.eoi_token_id
        assert self.count(processor, inputs) == (1, 2)
        later = [*messages[:1], assistant(odd_answer), user("blue"), *messages[1:]]
        inputs = processor.apply_chat_template(later, task="vla", continue_final_message=True)
        assert rows(inputs, "input_ids")[0][-len(odd_answer) + 3 :] == odd_answer[:-3]
        ids = rows(inputs, "negative_prompt_ids")[0]
        assert ids[: ids.index(layout.bss_token_id)].count(layout.boi_token_id) == 3
        # A finished answer is opened again.
        opened = processor.apply_chat_template(
            [messages[0], assistant(odd_answer)], task="vla", continue_final_message=True
        )
        assert rows(opened)[0][-len(odd_answer) + 2 :] == odd_answer[:-2]

    @pytest.mark.parametrize("cut", ["image", "rows"])
    def test_equals_one_run(self, model, processor, cut):
        """Stopped after an image, or in it, and gone on with: the tokens of one run, guidance included."""
        settings = {"generation_mode": "interleaved", "do_sample": False, "max_images": 2, "guidance_scale": 2.0}
        layout = processor.token_layout
        messages = [user("a small red circle above a large blue square")]
        start = [*processor._encode_text("red circle"), layout.boi_token_id]
        inputs = processor.apply_chat_template(
            [*messages, assistant(start)], task="story", continue_final_message=True
        )
        whole = model.generate(**inputs, **settings, max_new_tokens=100)
        answer = [*start[:-1], *answer_ids(whole).tolist()]
        place = answer.index(layout.eoi_token_id) + 1 if cut == "image" else answer.index(layout.boi_token_id) + 20
        inputs = processor.apply_chat_template(
            [*messages, assistant(answer[:place])], task="story", continue_final_message=True
        )
        rest = model.generate(**inputs, **settings, max_new_tokens=100 - (place - len(start)))
        given = inputs["input_ids"].shape[1]
        assert answer[:place] + rest.sequences[0, given:].tolist() == answer

    def test_batches_of_different_lengths(self, processor, odd_answer):
        """Images after the text in every turn of the user; a batch is its rows one by one; masks say who speaks."""
        short = [user("go north.", picture()), assistant("red")]
        long = [user("start", picture()), assistant(odd_answer), user("go east.", picture("black")), assistant("red")]
        for task in ("explore", "vla", "story", "howto"):
            inputs = processor.apply_chat_template(
                [short, long], task=task, continue_final_message=True, return_assistant_tokens_mask=True
            )
            assert len(inputs["pixel_values"]) == 3
            for row, messages in enumerate((short, long)):
                single = processor.apply_chat_template(
                    messages, task=task, continue_final_message=True, return_assistant_tokens_mask=True
                )
                for name in ("input_ids", "negative_prompt_ids"):
                    assert rows(inputs, name)[row] == rows(single, name)[0]
                length = single["input_ids"].shape[1]
                assert torch.equal(inputs["assistant_masks"][row, -length:], single["assistant_masks"][0])
                spoken = inputs["input_ids"][row][inputs["assistant_masks"][row].bool()].tolist()
                assert spoken == (odd_answer if row else []) + processor._encode_text("red")
            texts = processor.decode(inputs["input_ids"][1])
            for text in ("start", "go east."):
                assert f" USER: {text}<|image start|>" in texts
            assert self.count(processor, inputs, row=1) == (4, 0)


class TestTooLong:
    def test_the_turn_is_named(self, processor):
        limit = processor.tokenizer.model_max_length
        taken = processor.token_layout.num_image_tokens(6, 6)
        messages = []
        for number in range(limit // taken):
            messages += [user(f"go north. {number}", picture()), assistant([{"type": "image", "image": picture()}])]
        messages = messages[:-1]
        fits = next(n for n in range(1, len(messages), 2) if self.length(processor, messages[: n + 2]) is None)
        # The message that is named is the first one that does not fit.
        with pytest.raises(ValueError) as error:
            processor.apply_chat_template(messages, task="explore")
        left = limit - self.length(processor, messages[:fits])
        text = str(error.value)
        named = int(text.split("]")[0].split("[")[1])
        assert named in (fits, fits + 1) and f"`messages[{named}]`, the {messages[named]['role']}'s" in text
        assert f"(1 image: {taken})" in text and f"`max_length`={limit}" in text
        if named == fits:
            assert f"leave {left} of" in text
        with pytest.raises(ValueError, match=rf"`messages\[1\]\[{named + 1}\]`"):
            system = {"role": "system", "content": "You are a helpful assistant for explore task."}
            processor.apply_chat_template([[user("red")], [system, *messages]], task="explore")

    @staticmethod
    def length(processor, messages):
        try:
            return processor.apply_chat_template(messages, task="explore")["input_ids"].shape[1]
        except ValueError:
            return None

    def test_numbers(self, processor):
        one = processor.apply_chat_template([user("red", picture())], task="chat")["input_ids"].shape[1]
        messages = [user("red", picture()), assistant("yes"), user("blue", picture(), picture())]
        two = processor.apply_chat_template(messages[:2], task="chat", add_generation_prompt=False)["input_ids"].shape[
            1
        ]
        whole = processor.apply_chat_template(messages, task="chat")["input_ids"].shape[1]
        message = (
            rf"`messages\[2\]`, the user's, does not fit: it takes {whole - two} tokens \(2 images: 94\), but the "
            rf"turns before it leave {whole - 1 - two} of `max_length`={whole - 1}. Drop earlier turns, shorten"
        )
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, task="chat", max_length=whole - 1)
        assert processor.apply_chat_template(messages, task="chat", max_length=whole)["input_ids"].shape[1] == whole
        message = rf"`messages\[1\]`, the assistant's, .*takes {two - one} tokens, .*leave 0 of `max_length`={one}\."
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, task="chat", max_length=one)
        with pytest.raises(ValueError, match=rf"`messages\[0\]`, the user's, .*takes {one} tokens \(1 image: 47\)"):
            processor.apply_chat_template(messages, task="chat", max_length=one - 1)


class TestBadIds:
    def test_refused(self, processor):
        layout = processor.token_layout
        size = [layout.boi_token_id, *layout.size_token_ids(6, 6)]
        code = layout.visual_token_offset
        for ids, message in (
            (torch.zeros(1, 3, dtype=torch.long), "one sequence of ints"),
            (torch.zeros(3), "one sequence of ints"),
            (torch.tensor(3), "one sequence of ints"),
            ([5, -1], "one sequence of ints"),
            ([5, layout.visual_token_end], rf"in \[0, {layout.visual_token_end}\)"),
            ([layout.bos_token_id, 5], "these ids hold a prompt"),
            (size, "incomplete image"),
            ([*size, layout.img_token_id, code, layout.eoi_token_id], r"incomplete image .*instead of 6\*6"),
        ):
            with pytest.raises(ValueError, match=rf"`messages\[1\]`.*{message}"):
                processor.apply_chat_template([user("a"), assistant(ids), user("b")])

    def test_only_the_end_may_be_inside_an_image(self, processor):
        layout = processor.token_layout
        begun = [layout.boi_token_id, *layout.size_token_ids(6, 6), layout.img_token_id, layout.visual_token_offset]
        inputs = processor.apply_chat_template([user("a"), assistant(begun)], continue_final_message=True)
        assert rows(inputs)[0][-len(begun) :] == begun
        assert layout.boi_token_id not in rows(inputs, "negative_prompt_ids")[0]
        with pytest.raises(ValueError, match="incomplete image"):
            processor.apply_chat_template([user("a"), assistant([*begun, 5])], continue_final_message=True)

    def test_ids_are_the_assistants(self, processor):
        with pytest.raises((TypeError, ValueError), match=r"`messages\[0\]`"):
            processor.apply_chat_template([{"role": "user", "content": [1, 2]}])
