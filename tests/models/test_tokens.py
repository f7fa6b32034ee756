"""Texts to tokens, padding and positions, against loops over single tokens."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repe.models.tokens import encode, pad, positions_at, strings
from tests import subwords, zoo
from tests.layouts import layouts

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "ab"}]


def spelled(text: str) -> list[int]:
    """Tokens by their names, one a character or a mark in angle brackets."""
    vocabulary, ids = zoo.tokenizer().get_vocab(), []
    while text:
        name = next((mark for mark in zoo.SPECIAL_TOKENS if text.startswith(mark)), text[0])
        ids.append(vocabulary[name])
        text = text[len(name) :]
    return ids


# encoding


def test_a_text_has_one_bos_and_its_characters():
    assert encode(zoo.tokenizer(), "a b") == spelled("<bos>a b")


def test_a_chat_has_one_bos_and_opens_the_answer():
    assert encode(zoo.tokenizer(), CHAT) == spelled("<bos><system>S<end><user>u<end><assistant>")


@pytest.mark.parametrize("content", ["ab", " ab ", "u", "a<end>b"])
def test_a_begun_answer_is_continued(content):
    ids = encode(zoo.tokenizer(), [*CHAT, {"role": "assistant", "content": content}])
    assert ids == spelled("<bos><system>S<end><user>u<end><assistant>" + content.strip())


def test_an_answer_of_no_tokens_is_one_to_be_opened():
    assert encode(zoo.tokenizer(), [*CHAT, {"role": "assistant", "content": ""}]) == encode(zoo.tokenizer(), CHAT)


def test_messages_may_be_any_mapping_and_are_not_changed():
    messages = tuple(dict(m) for m in BEGUN)
    assert encode(zoo.tokenizer(), messages) == encode(zoo.tokenizer(), BEGUN)
    assert list(messages) == BEGUN


@pytest.mark.parametrize("padded", [True, False])
def test_the_tokenizer_stays_as_it_was(padded):
    tokenizer = zoo.tokenizer(pad=padded)
    before = state_of(tokenizer)
    for text in ("a b", CHAT, BEGUN):
        assert encode(tokenizer, text) == encode(zoo.tokenizer(), text)
    strings(tokenizer, [3, 20])
    assert state_of(tokenizer) == before
    assert (tokenizer.pad_token is None) != padded


def state_of(tokenizer) -> tuple:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    public = {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"}
    return backend, public, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side


def test_a_text_of_no_tokens_is_refused():
    tokenizer = zoo.tokenizer()
    assert encode(tokenizer, "") == spelled("<bos>")
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="the text '' has no tokens: give a text of at least one token"):
        encode(tokenizer, "")


def test_every_token_is_read_as_it_stands():
    tokenizer = zoo.tokenizer()
    assert strings(tokenizer, encode(tokenizer, "a b")) == ("<bos>", "a", " ", "b")


HARD = [
    "I never took it, wasn't it nice?",
    "  two  spaces and a\nline ",
    "日本語 🙂 is it; 👩‍👩‍👧 too",
    "🙂",
    "a broken letter: \ufffd",
    "🙂\ufffd🙂",
]


SPELLING = ["bytes", "fallback"]  # what spells every letter


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("kind", subwords.KINDS)
@pytest.mark.parametrize("added", subwords.ADDED)
def test_tokens_are_together_the_text_whose_tokens_they_are(kind, text, added):
    """However its letters and spaces are spread over them; none is a part of a letter."""
    tokenizer = subwords.subwords(kind, added)
    ids = encode(tokenizer, text)
    found = strings(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "".join(found).count("\ufffd") == text.count("\ufffd") * (kind in SPELLING)
    assert not any(subwords.SPACE in part or "##" in part for part in found)


@pytest.mark.parametrize("kind", SPELLING)
def test_a_token_stands_where_the_text_has_it(kind):
    """By the offsets that the tokenizer itself gives."""
    tokenizer, text = subwords.subwords(kind, "nothing"), "She said yes, 日本 and 🙂 he said no."
    found, end = strings(tokenizer, encode(tokenizer, text)), 0
    for part, (_, stop) in zip(found, tokenizer(text, return_offsets_mapping=True)["offset_mapping"], strict=True):
        end += len(part)
        assert end in (stop, stop - 1)  # a letter that is not whole yet
        assert part == text[end - len(part) : end]


# padding


ragged = st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=6), min_size=1, max_size=4)


@given(ragged, st.sampled_from(["left", "right"]))
def test_padding_hides_all_but_the_rows(rows, side):
    batch = pad(rows, side)
    width = max(map(len, rows))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), width)
    for ids, mask, row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), rows, strict=True):
        fill = [0] * (width - len(row))
        assert ids == (fill + row if side == "left" else row + fill)
        assert mask == (fill + [1] * len(row) if side == "left" else [1] * len(row) + fill)
    assert {t.dtype for t in batch.values()} == {torch.long}


# positions


@given(layouts())
def test_positions_count_what_is_not_padding(layout):
    positions, valid = positions_at(*layout.tensors())
    assert positions.shape == valid.shape == (len(layout.mask), len(layout.slots))
    for row, places in enumerate(layout.positions):
        for column, position in enumerate(places):
            assert bool(valid[row, column]) == (position is not None)
            if position is not None:
                assert positions[row, column] == position


def test_without_a_mask_slots_are_positions():
    positions, valid = positions_at(torch.tensor([3, 4]), None)
    assert positions.tolist() == [[3, 4]]
    assert valid is None
