"""Texts that go on: no end token, and the spaces that stand between what was read and what is written."""

import pytest

from repe.models.ends import decoded_behind, unended
from tests.subwords import KINDS, subwords

TEXTS = ("The capital", "<bos>is<eos>", " do ", "<eos>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ["nothing", "begin"])
def test_a_text_without_an_end_token_is_as_its_tokenizer_has_it(kind, added):
    tokenizer, ended = subwords(kind, added), subwords(kind, {"nothing": "end", "begin": "both"}[added])
    for text in TEXTS:
        assert unended(tokenizer, text) == unended(ended, text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" Paris", " is Rome", "s"])
def test_what_is_written_behind_a_text_keeps_its_space(kind, text):
    tokenizer = subwords(kind)
    before, together = (tokenizer(said)["input_ids"] for said in ("The capital", f"The capital{text}"))
    if together[: len(before)] == before:  # a word may be one token, and no two
        said = decoded_behind(tokenizer, before, together[len(before) :])
        assert said == (text.lower() if kind == "wordpiece" else text)


def test_what_stands_behind_half_a_character_is_decoded_alone():
    class Halves:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    assert decoded_behind(Halves(), [*b"a", 0xC3], [0xA9, *b"b"]) == "\N{REPLACEMENT CHARACTER}b"


def test_a_tokenizer_that_writes_a_text_otherwise_with_special_tokens_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 5, 1, 6] if add_special_tokens else [5, 6]}

    with pytest.raises(ValueError, match=r"function gives 'a' the tokens \[5, 6\], and with special tokens \[1, 5, 1"):
        unended(tokenizer, "a")
