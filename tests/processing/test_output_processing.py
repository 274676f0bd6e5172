import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from emu35.image_tokens_emu35 import find_images
from emu35.segments_emu35 import decode_images, iter_images, parse_segments, pixels_to_pil

#: What the release makes of bad input, and what it loses there; here nothing is lost.
BETTER = {
    "incomplete_image_end": ["text 'text '", "image 2x3 incomplete"],  # release: nothing at all
    "incomplete_image_then_text": ["text 'A'", "image 2x3", "text 'B'", "image 1x2 incomplete"],  # loses B and after
    "start_only": ["text 'x'", "image 0x0 incomplete"],  # nothing at all
    "image_no_start": ["text '2*3<|image token|>'", "image 1x2 incomplete", "text ' tail'"],  # all of it as text
    "ragged_rows": ["text 'q'", "image 1x2 incomplete", "text 'r'"],  # drops the image silently
    "size_text_disagrees": ["image 2x2 incomplete"],  # does not notice
    "empty_image": ["text 'a'", "image 0x0 incomplete", "text 'b'"],  # drops it silently
    "code_out_of_range": ["image 1x2", "text 'ok'"],  # drops it silently
    "trailing_eol": ["image 1x2 incomplete"],  # does not notice
    "nested_start": ["image 0x0 incomplete", "image 1x1"],  # does not notice the first begin
    "unclosed_global_cot": ["global_thought 'never closed text' incomplete"],  # as text, with the control token
    "image_in_global_cot": ["global_thought 'thinking '", "text 'after'"],  # loses the thought; the image is inside
    "cot_with_other_cot": ["global_thought 'xyz'", "image_thought 'w'"],  # control tokens in the text
    "embed_dim16_model": ["text 'z'", "image 2x3"],  # crashes in reshaping
}
KINDS = {"global_cot": "global_thought", "image_cot": "image_thought"}


def summary(segment):
    end = "" if getattr(segment, "complete", True) else " incomplete"
    if segment.kind == "image":
        return f"image {'x'.join(map(str, segment.codes.shape))}{end}"
    return f"{segment.kind} {segment.text!r}{end}"


def expected_summary(case):
    if case["name"] in BETTER:
        return BETTER[case["name"]]
    return [
        f"image {payload['size_wh'][1] // 16}x{payload['size_wh'][0] // 16}"
        if kind == "image"
        else f"{KINDS.get(kind, kind)} {payload!r}"
        for kind, payload in case["output"]
    ]


class TestParity:
    def test_segments(self, small, fixture_json):
        """`string`, read with control tokens, gives the same ids as the release's up to the vocabulary."""
        for case in fixture_json("multimodal_decode.json")["cases"]:
            ids = small._encode_text(case["string"], allow_control_tokens=True)
            assert small.decode(ids) == case["string"]
            segments = small.decode_multimodal(ids, skip_special_tokens=False)
            assert [summary(segment) for segment in segments] == expected_summary(case), case["name"]

    def test_segments_of_the_released_ids(self, released, fixture_json):
        for case in fixture_json("multimodal_decode.json")["cases"]:
            assert released._encode_text(case["string"], allow_control_tokens=True) == case["ids"]
            segments = released.decode_multimodal(torch.tensor(case["ids"]), skip_special_tokens=False)
            assert [summary(segment) for segment in segments] == expected_summary(case), case["name"]

    def test_pixels(self, small, fixture_json, fixtures_dir, reference_vision_tokenizer):
        compared = 0
        for case in fixture_json("multimodal_decode.json")["cases"]:
            if case["ibq"] != "ibq_main":
                continue
            ids = small._encode_text(case["string"], allow_control_tokens=True)
            segments = small.decode_multimodal(ids, vision_tokenizer=reference_vision_tokenizer)
            images = {image.image.size: image.image for image in iter_images(segments) if image.image is not None}
            for payload in (payload for kind, payload in case["output"] if kind == "image"):
                expected = np.asarray(PIL.Image.open(fixtures_dir / payload["png"])).astype(int)
                assert np.abs(np.asarray(images[tuple(payload["size_wh"])]) - expected).max() <= 1
                compared += 1
        assert compared == 12

    def test_code_outside_the_codebook(self, small, reference_vision_tokenizer):
        ids = small.token_layout.image_token_ids([[small.token_layout.visual_token_offset + 512]])
        (image,) = small.decode_multimodal(ids, vision_tokenizer=reference_vision_tokenizer)
        assert not image.complete and image.image is None
        assert image.reason == "code 512 is outside the codebook of 512"


@pytest.fixture
def words(small):
    return small._encode_text


@pytest.fixture
def layout(small):
    return small.token_layout


def image_ids(layout, rows):
    return layout.image_token_ids([[layout.visual_token_offset + code for code in row] for row in rows])


class TestSegments:
    def test_control_tokens_out_of_place(self, small, words, layout):
        ids = [layout.bos_token_id, *words("a"), layout.eog_token_id, *words("b"), layout.pad_token_id]
        assert [s.text for s in small.decode_multimodal(ids)] == ["ab"]
        (text,) = small.decode_multimodal(ids, skip_special_tokens=False)
        assert text.text == "<|extra_203|>a<|extra_61|>b<|endoftext|>"

    def test_image_cut_at_every_token(self, small, words, layout):
        """Wherever generation stops, the text before is there, and so are all codes."""
        image = image_ids(layout, [[1, 2, 3], [4, 5, 6]])
        for length in range(1, len(image)):
            text, cut = small.decode_multimodal([*words("a red circle"), *image[:length]])
            assert text.text == "a red circle"
            assert not cut.complete and cut.reason.startswith("not closed")
            codes = [
                token - layout.visual_token_offset for token in image[:length] if token >= layout.visual_token_offset
            ]
            assert [code for row in cut.rows for code in row] == codes
            assert cut.codes.numel() == len(codes) // 3 * 3 or len(codes) < 3
            if layout.img_token_id in image[:length]:
                assert cut.size == (2, 3)

    def test_text_after_an_unfinished_image(self, small, words, layout):
        image = image_ids(layout, [[1, 2], [3, 4]])[:-2]
        segments = small.decode_multimodal([*image, *words("then red"), *image_ids(layout, [[5]])])
        assert [summary(s) for s in segments] == ["image 1x2 incomplete", "text 'then red'", "image 1x1"]
        assert segments[0].rows == ((1, 2), (3,))

    def test_begin_of_image_before_a_number(self, small, words, layout):
        segments = small.decode_multimodal([layout.boi_token_id, *words("3 circles")])
        assert [summary(s) for s in segments] == ["image 0x0 incomplete", "text '3 circles'"]

    def test_unfinished_thoughts(self, small, words, layout):
        ids = [layout.bog_token_id, *words("plan"), layout.boc_token_id, *words("red"), *image_ids(layout, [[1]])]
        ids += [*words("end"), layout.eos_token_id]
        assert [summary(s) for s in small.decode_multimodal(ids)] == [
            "global_thought 'plan' incomplete",
            "image_thought 'red' incomplete",
            "image 1x1",
            "text 'end'",
        ]

    def test_global_thought_with_everything(self, small, words, layout):
        ids = [layout.bog_token_id, *words("a"), *image_ids(layout, [[1]]), layout.boc_token_id, *words("b")]
        (thought,) = small.decode_multimodal([*ids, layout.eoc_token_id, layout.eog_token_id])
        assert [summary(s) for s in thought.segments] == ["text 'a'", "image 1x1", "image_thought 'b'"]
        assert thought.text == "ab" and thought.complete
        assert len(list(iter_images([thought]))) == 1

    def test_placeholders(self, small, layout):
        (image,) = small.decode_multimodal(layout.image_token_ids([[layout.image_placeholder_token_id] * 2]))
        assert not image.complete and "resolve_image_tokens" in image.reason
        decode_images([image], lambda codes: pytest.fail("there are no codes"))

    def test_skip_prompt(self, small, words, layout):
        prompt = small(text="a red circle")["input_ids"][0].tolist()
        answer = [*words("yes"), layout.ess_token_id, layout.eos_token_id]
        assert [s.text for s in small.decode_multimodal(prompt + answer, skip_prompt=True)] == ["yes"]
        assert [s.text for s in small.decode_multimodal(answer, skip_prompt=True)] == ["yes"]
        assert "USER: a red circle" in small.decode_multimodal(prompt + answer)[0].text

    def test_random_sequences(self, small, layout):
        """Never an exception, no visual token lost, and the same images as the model's own parser finds."""
        rng = random.Random(0)
        special = list(layout.special_token_ids.values())
        special.remove(layout.image_placeholder_token_id)
        digits = list(layout.digit_token_ids)
        for _ in range(2000):
            ids = []
            for _ in range(rng.randint(0, 10)):
                if rng.random() < 0.4:
                    width = rng.randint(1, 3)
                    piece = image_ids(layout, [[rng.randrange(8)] * width for _ in range(rng.randint(1, 3))])
                    for _ in range(rng.choice([0, 0, 1, 2])):
                        piece[rng.randrange(len(piece))] = rng.choice([*special, *digits, layout.visual_token_offset])
                    ids += piece[rng.choice([0, 0, 0, 1]) :]
                else:
                    ids.append(rng.choice([*special, *digits, 70, 71]))
            segments = small.decode_multimodal(ids)
            images = list(iter_images(segments))
            visual = [token - layout.visual_token_offset for token in ids if token >= layout.visual_token_offset]
            assert [code for image in images for row in image.rows for code in row] == visual
            found = [image.codes for image in find_images(ids, layout) if image.complete]
            assert [tuple(image.codes.flatten().tolist()) for image in images if image.complete] == found

    def test_without_any_roles(self, layout):
        """A vocabulary without thoughts or images has only text."""
        bare = type(layout)(
            **{f"{role}_token_id": None for role in layout.special_token_ids},
            visual_token_offset=9,
            num_visual_tokens=0,
        )
        (text,) = parse_segments([1, 2], bare, str)
        assert text.text == "[1, 2]"


class TestPixels:
    def test_decoders(self, small, layout):
        """A function, an object with `decode`, and a model with `decode_image` all do."""
        ids = image_ids(layout, [[0, 100]])

        def decode(codes):
            assert codes.shape == (1, 1, 2) and codes.dtype == torch.long
            pixels = codes[:, None].expand(1, 3, 1, 2) / 50 - 1
            return pixels.repeat_interleave(16, 2).repeat_interleave(16, 3)

        for decoder in (
            decode,
            SimpleNamespace(decode=decode),
            SimpleNamespace(decode_image=lambda grids: [decode(grids[0][None])[0]]),
        ):
            (image,) = small.decode_multimodal(ids, vision_tokenizer=decoder)
            assert image.image.size == (32, 16)
            assert image.image.getpixel((0, 0)) == (0, 0, 0) and image.image.getpixel((31, 0)) == (255, 255, 255)
        (image,) = small.decode_multimodal(ids)
        assert image.image is None and image.complete and image.codes.tolist() == [[0, 100]]
        with pytest.raises(TypeError, match="`vision_tokenizer` must be a model"):
            small.decode_multimodal(ids, vision_tokenizer=3)

    def test_unfinished_image_gives_its_whole_rows(self, small, layout):
        ids = image_ids(layout, [[1, 2], [3, 4]])[:-2]
        (image,) = small.decode_multimodal(ids, lambda codes: torch.zeros(1, 3, 16 * codes.shape[1], 32))
        assert not image.complete and image.image.size == (32, 16)

    def test_pixels_are_clamped_and_truncated(self):
        values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
        image = pixels_to_pil(values.expand(3, 1, 6))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
        assert pixels_to_pil(image) is image
        assert np.array_equal(np.asarray(pixels_to_pil(torch.tensor(np.asarray(image)))), np.asarray(image))
        for bad in (torch.zeros(4, 2, 2), torch.zeros(2, 2), torch.zeros(3, 2, 2, dtype=torch.long)):
            with pytest.raises(ValueError, match=r"floats of the shape \(3, H, W\)"):
                pixels_to_pil(bad)


class TestBatches:
    def rows(self, small, layout, words):
        prompt = small(text=["red", "a small blue square"])["input_ids"]
        end = [layout.ess_token_id, layout.eos_token_id]
        answers = [[*image_ids(layout, [[1]]), *end], [*words("yes"), *end]]
        longest = max(map(len, answers))
        answers = [[*answer, *[layout.pad_token_id] * (longest - len(answer))] for answer in answers]
        return prompt, torch.cat([prompt, torch.tensor(answers)], dim=1)

    def test_ids(self, small, layout, words):
        _, sequences = self.rows(small, layout, words)
        for out in (sequences, sequences.numpy(), sequences.tolist(), SimpleNamespace(sequences=sequences)):
            segments = small.post_process_multimodal_output(out)
            assert [[summary(s) for s in row] for row in segments] == [["image 1x1"], ["text 'yes'"]]
        assert len(small.post_process_multimodal_output(sequences[0])) == 1
        with_prompt = small.post_process_multimodal_output(sequences, skip_prompt=False)
        assert "USER: red" in with_prompt[0][0].text

    def test_answer_start(self, small, layout, words):
        """An answer that begins inside the prompt (an image that was continued) is taken from where it begins."""
        prompt, sequences = self.rows(small, layout, words)
        start = prompt.shape[1]
        out = SimpleNamespace(sequences=sequences, answer_start=torch.tensor([start, start + 1]))
        assert [len(row) for row in small.post_process_multimodal_output(out)] == [1, 0]

    def test_pictures_that_come_with_the_output(self, small, layout, words):
        _, sequences = self.rows(small, layout, words)
        picture = torch.full((16, 16, 3), 7, dtype=torch.uint8)
        for images in ([[picture], []], [picture]):
            out = SimpleNamespace(sequences=sequences, images=images)
            segments = small.post_process_multimodal_output(out)
            assert segments[0][0].image.getpixel((0, 0)) == (7, 7, 7)
        assert small.post_process_multimodal_output(out, skip_prompt=False)[0][1].image is None
        with pytest.raises(ValueError, match="the output has 2 images, but its sequences hold 1"):
            small.post_process_multimodal_output(SimpleNamespace(sequences=sequences, images=[picture] * 2))

    def test_text_mode_as_pipelines_call_it(self, small, layout, words):
        """The prompt's text is a prefix of the whole text, whether or not its image is resolved yet."""
        inputs = small(text="red", images=PIL.Image.new("RGB", (32, 32)), task="vqa")
        ids = inputs["input_ids"]
        resolved = ids.masked_fill(ids == layout.image_placeholder_token_id, layout.visual_token_offset)
        sequences = torch.cat([resolved, torch.tensor([[*words("yes"), layout.ess_token_id]])], dim=1)
        for mode in (None, "text"):
            (before,) = small.post_process_multimodal_output(ids, skip_special_tokens=True, generation_mode=mode)
            (after,) = small.post_process_multimodal_output(sequences, generation_mode=mode)
            assert after == before + "yes"
            assert before == "You are a helpful assistant. USER:  red ASSISTANT: "
        assert small.post_process_image_text_to_text(sequences) == [after]
        (raw,) = small.post_process_multimodal_output(sequences, skip_special_tokens=False, generation_mode="text")
        assert raw.startswith("<|extra_203|>") and "<|visual token 000000|>" in raw

    def test_image_mode_as_pipelines_call_it(self, small):
        pixels = [torch.zeros(3, 16, 32), torch.zeros(3, 16, 16)]
        images = small.post_process_multimodal_output(pixels, skip_special_tokens=True, generation_mode="image")
        assert [image.size for image in images] == [(32, 16), (16, 16)]

    def test_bad_arguments(self, small, layout):
        with pytest.raises(ValueError, match=r"`generation_mode` must be .* got 'video'"):
            small.post_process_multimodal_output([[1]], generation_mode="video")
        with pytest.raises(TypeError, match=r"unknown arguments: \['colour'\]"):
            small.post_process_multimodal_output([[1]], colour=3)
        with pytest.raises(ValueError, match="must be one sequence"):
            small.decode_multimodal([[1, 2]])
        for bad in (-100, layout.visual_token_end):
            with pytest.raises(ValueError, match=f"`ids` holds {bad}, outside the vocabulary"):
                small.decode_multimodal([1, bad])


class TestDecode:
    def test_visual_tokens(self, small, layout):
        ids = [*small._encode_text("a"), layout.visual_token_offset + 12, layout.boi_token_id]
        assert small.decode(ids) == "a<|visual token 000012|><|image start|>"
        assert small.decode(torch.tensor(ids), skip_special_tokens=True) == "a"
        assert small.decode(ids[1]) == "<|visual token 000012|>"
        assert small.decode([ids, ids]) == small.batch_decode(torch.tensor([ids, ids])) == [small.decode(ids)] * 2
        assert small.decode([]) == ""
