import base64
import json
import unicodedata

import pytest
from emu35.configuration_emu35 import SPECIAL_TOKENS, Emu35TokenLayout
from emu35.processing_emu35 import Emu35Processor
from emu35.tokenization_emu35 import (
    RELEASED_CONTROL_TOKENS,
    token_layout_from_tokenizer,
    tokenizer_from_qwen,
    tokenizer_from_tiktoken,
    train_small_tokenizer,
)
from transformers import AutoTokenizer


def fields(layout: Emu35TokenLayout) -> dict:
    values = {name: getattr(layout, name) for name in Emu35TokenLayout.__annotations__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class TestReleased:
    def test_ids_of_all_strings(self, released: Emu35Processor, fixture_json):
        for case in fixture_json("tokenizer_text.json")["strings"]:
            assert released._encode_text(case["text"], allow_control_tokens=True) == case["ids"], case["text"]

    def test_decoded_strings(self, released: Emu35Processor, fixture_json):
        reference = fixture_json("tokenizer_text.json")
        for case in reference["strings"] + reference["decode_only"]:
            assert released.decode(case["ids"]) == case["decoded"]
            assert released.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]

    def test_the_tokenizer_alone(self, released_tokenizer, fixture_json):
        """Without the processor visual tokens are unknown; everything else is the same."""
        first_visual = Emu35TokenLayout().visual_token_offset
        cases = fixture_json("tokenizer_text.json")["strings"]
        cases = [case for case in cases if max(case["ids"], default=0) < first_visual]
        assert len(cases) > 300
        texts = [case["text"] for case in cases]
        assert released_tokenizer(texts, add_special_tokens=False)["input_ids"] == [case["ids"] for case in cases]
        assert [released_tokenizer.decode(case["ids"]) for case in cases] == [case["decoded"] for case in cases]

    def test_surrogates(self, released: Emu35Processor, fixture_json):
        for case in fixture_json("tokenizer_text.json")["surrogates"]:
            ids = released._encode_text(json.loads(case["text_json_escaped"]))
            assert ids == case["ids"]
            assert released.decode(ids) == case["decoded"]

    def test_layout(self, released_tokenizer, fixture_json):
        layout = token_layout_from_tokenizer(released_tokenizer, Emu35TokenLayout().num_visual_tokens)
        assert fields(layout) == fields(Emu35TokenLayout())
        assert len(released_tokenizer) == layout.visual_token_offset
        for token, token_id in fixture_json("tokenizer_text.json")["special_ids"].items():
            if "visual token" not in token:
                assert released_tokenizer.convert_tokens_to_ids(token) == token_id

    def test_from_qwen_directory(self, released_tokenizer, tmp_path):
        """A Qwen directory has the same text tokens and control tokens of its own, which must not survive."""
        whole = json.loads(released_tokenizer.backend_tokenizer.to_str())
        whole["added_tokens"] = whole["added_tokens"][:2]
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(whole))
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        merges = "\n".join(" ".join(merge) for merge in whole["model"]["merges"])
        (tmp_path / "b" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        for name in "ab":
            tokenizer = tokenizer_from_qwen(tmp_path / name)
            assert tokenizer.get_vocab() == released_tokenizer.get_vocab()
            text = "USER: 12*34 naïve 🙂 <|extra_203|>"
            assert tokenizer(text)["input_ids"] == released_tokenizer(text)["input_ids"]


def test_control_tokens_are_those_of_the_release():
    assert len(RELEASED_CONTROL_TOKENS) == len(set(RELEASED_CONTROL_TOKENS)) == 211
    assert set(SPECIAL_TOKENS.values()) <= set(RELEASED_CONTROL_TOKENS)


class TestSmall:
    def test_words_digits_and_star_are_single_tokens(self, small_tokenizer):
        assert small_tokenizer.tokenize("a small red circle") == ["a", "Ġsmall", "Ġred", "Ġcircle"]
        assert small_tokenizer.tokenize("12*345") == ["1", "2", "*", "3", "4", "5"]

    def test_control_tokens_come_right_after_the_text(self, small_tokenizer):
        layout = token_layout_from_tokenizer(small_tokenizer, 100, size_digits=(1, 2))
        ids = sorted(layout.special_token_ids.values())
        assert ids == list(range(layout.visual_token_offset - len(SPECIAL_TOKENS), layout.visual_token_offset))
        assert layout.visual_token_offset == len(small_tokenizer) <= 512
        assert list(layout.size_digits) == [1, 2]

    @pytest.mark.parametrize("text", ["naïve 🙂 你好", "\x00\t\r\n", "", "  two  spaces", "e\u0301"])
    def test_any_text_can_be_encoded(self, small_tokenizer, text):
        assert small_tokenizer.decode(small_tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)

    def test_training_is_deterministic(self):
        texts = ["red circle and blue square"] * 2
        assert train_small_tokenizer(texts, 300).get_vocab() == train_small_tokenizer(texts, 300).get_vocab()

    def test_save_and_reload(self, small_tokenizer, tmp_path):
        small_tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again.get_vocab() == small_tokenizer.get_vocab()
        assert (again.bos_token, again.eos_token, again.pad_token) == tuple(
            SPECIAL_TOKENS[role] for role in ("bos", "eos", "pad")
        )
        assert (again.padding_side, again.model_max_length) == ("left", 1024)
        text = "a red circle <|extra_203|> 12*34"
        assert again(text)["input_ids"] == small_tokenizer(text)["input_ids"]

    def test_vocabulary_too_small(self):
        with pytest.raises(ValueError, match=r"`vocab_size` must be at least 272 .* got 271"):
            train_small_tokenizer(["a"], 271)


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"emu3\.tiktoken"):
            tokenizer_from_tiktoken(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
            tokenizer_from_qwen(tmp_path)

    @pytest.mark.parametrize("line", [b"IQ==", b"IQ== x", b"@@@ 1"])
    def test_malformed_line(self, tmp_path, line):
        (tmp_path / "emu3.tiktoken").write_bytes(b"IQ== 0\n" + line + b"\n")
        with pytest.raises(ValueError, match="line 2"):
            tokenizer_from_tiktoken(tmp_path)

    def test_gaps(self, tmp_path):
        lines = [base64.b64encode(bytes([byte])) + b" %d" % (byte + 1) for byte in range(256)]
        (tmp_path / "emu3.tiktoken").write_bytes(b"\n".join(lines))
        with pytest.raises(ValueError, match=r"ranks must be 0\.\.n-1"):
            tokenizer_from_tiktoken(tmp_path)

    def test_not_a_byte_level_bpe(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
        with pytest.raises(ValueError, match="Unigram"):
            tokenizer_from_qwen(tmp_path)
        (tmp_path / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": []}})
        )
        with pytest.raises(ValueError, match="without gaps"):
            tokenizer_from_qwen(tmp_path)

    def test_foreign_tokenizer_has_no_layout(self, small_tokenizer, tmp_path):
        whole = json.loads(small_tokenizer.backend_tokenizer.to_str())
        whole["added_tokens"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
        from transformers import PreTrainedTokenizerFast

        foreign = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="`tokenizer` lacks"):
            token_layout_from_tokenizer(foreign, 8)


def test_ranks_decide_the_merges(tmp_path):
    """ "abc": with the rank of "bc" before "ab", tiktoken merges "bc" first, and "a" + "bc" completes "abc"."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"bc", b"ab", b"abc", b"cd"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "emu3.tiktoken").write_bytes(b"\n".join(lines))
    tokenizer = tokenizer_from_tiktoken(tmp_path)
    assert tokenizer.tokenize("abcd") == ["abc", "d"]
    assert tokenizer.tokenize("abab") == ["ab", "ab"]
    assert tokenizer.tokenize("bcd") == ["bc", "d"]
