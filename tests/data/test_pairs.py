"""Contrast pairs: what is wrong with one says which, and no split leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repe.data.pairs import ContrastPair, check, split


def crossed(templates: int, items: int) -> list[ContrastPair]:
    return [
        ContrastPair(f"{t} {i} yes", f"{t} {i} no", f"t{t}", f"i{i}") for t in range(templates) for i in range(items)
    ]


# Pairs


def test_a_pair_is_frozen_and_a_list_of_messages_becomes_a_tuple():
    pair = ContrastPair([{"role": "user", "content": "yes"}], [{"role": "user", "content": "no"}])
    assert pair.positive == ({"role": "user", "content": "yes"},)
    with pytest.raises(AttributeError):
        pair.template = "other"


CHAT = ({"role": "user", "content": "yes"},)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (ContrastPair("", "no"), "pair 1: positive is empty"),
        (ContrastPair("yes", " \n"), "pair 1: negative is empty"),
        (ContrastPair("yes", ()), "pair 1: negative is empty"),
        (ContrastPair("yes", ({"role": "user", "content": ""},)), "pair 1: negative is empty"),
        (ContrastPair("yes", None), "pair 1: negative must be a text or a list of messages, and is None"),
        (ContrastPair("yes", ({"role": "user"},)), "pair 1: negative: message 0 has the content None"),
        (ContrastPair(CHAT, ({"role": "User", "content": "no"},)), "negative: message 0 has the role 'User': expected"),
        (ContrastPair("yes", CHAT), "pair 1: one pole is a text and the other a chat"),
        (ContrastPair("yes", "yes"), "pair 1: the positive and the negative are identical"),
        (ContrastPair("yes", "yes", "t", "i"), r"pair 1 \(template 't', item 'i'\): .* identical"),
        (ContrastPair(CHAT, CHAT, item="i"), r"pair 1 \(item 'i'\): .* identical"),
    ],
)
def test_check_names_the_pair_and_what_is_wrong_with_it(pair, message):
    with pytest.raises(ValueError, match=message):
        check([ContrastPair("yes", "no"), pair])


def test_check_refuses_no_pairs_and_accepts_good_ones():
    with pytest.raises(ValueError, match="no contrast pairs"):
        check([])
    check([ContrastPair("yes", "no"), ContrastPair(CHAT, ({"role": "user", "content": "no"},))])


# Splitting


@settings(deadline=None)
@given(
    design=st.sets(st.tuples(st.sampled_from(["", *"abcd"]), st.sampled_from(["", *"uvwxyz"])), min_size=1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_no_template_or_item_is_on_both_sides(design, share, seed):
    pairs = [ContrastPair(f"{place} yes", f"{place} no", *place) for place in sorted(design)]
    try:
        fit, held = split(pairs, share, seed)
    except ValueError as error:
        assert "at least 2 of each" in str(error)  # noqa: PT017
        return
    assert min(len(fit), len(held)) >= 2
    assert set(fit) | set(held) <= set(pairs)
    templates, items = ({getattr(pair, name) for pair in pairs} for name in ("template", "item"))
    if len(templates) > 1:
        assert not {pair.template for pair in fit} & {pair.template for pair in held}
    if len(items) > 1:
        assert not {pair.item for pair in fit} & {pair.item for pair in held} - {""}
    assert not set(fit) & set(held)


@pytest.mark.parametrize(("templates", "items"), [(1, 4), (4, 1), (2, 4), (3, 3), (4, 3), (6, 2), (6, 6), (50, 50)])
def test_a_small_crossed_design_is_split(templates, items):
    fit, held = split(crossed(templates, items))
    assert len(fit) >= 2
    assert len(held) >= 2


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_share_is_of_templates_and_of_items(share):
    fit, held = split(crossed(4, 20), share)
    assert len({pair.template for pair in held}) == 4 * share
    assert len({pair.item for pair in held}) == 20 * share
    assert len(fit) == 4 * 20 * (1 - share) ** 2
    assert len(held) == 4 * 20 * share**2


def test_a_great_share_leaves_a_template_and_an_item_to_fit_on():
    fit, held = split(crossed(2, 10), 0.75)
    assert (len(fit), len(held)) == (2, 8)


def test_items_of_one_template_go_with_it():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", f"t{n // 5}", f"i{n}" * (n % 2)) for n in range(20)]
    fit, held = split(pairs)
    assert (len(fit), len(held)) == (15, 5)


def test_an_item_that_alone_is_shared_does_not_leak():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", f"t{n % 2}", f"i{n // 2 and n}") for n in range(10)]
    fit, held = split(pairs)
    assert "i0" not in {pair.item for pair in fit}
    assert len(fit) == 4
    assert len(held) == 5


def test_the_split_is_the_seeds():
    pairs = crossed(4, 8)
    assert split(pairs, seed=3) == split(pairs, seed=3)
    assert len({split(pairs, seed=seed) for seed in range(10)}) > 5
    backwards = split(pairs[::-1], seed=3)
    assert [set(side) for side in backwards] == [set(side) for side in split(pairs, seed=3)]


def test_the_split_is_the_same_in_another_process():
    code = (
        "from repe.data.pairs import ContrastPair, split;"
        "print(split([ContrastPair(f'{t}{i}', '-', t, i) for t in 'abc' for i in 'uvwxyz']))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(outputs) == 1


def test_the_pairs_own_decision_stands():
    pairs = [ContrastPair(f"{n} yes", f"{n} no", held_out=n > 2) for n in range(5)]
    assert split(pairs, 0.5) == (tuple(pairs[:3]), tuple(pairs[3:]))


@pytest.mark.parametrize(
    ("pairs", "share", "message"),
    [
        ([], 0.25, "no contrast pairs"),
        (crossed(1, 3), 0.25, "3 pairs split into 1 to fit on and 2 held out, and at least 2 of each are needed"),
        (crossed(1, 1), 0.25, "1 pairs split into 0 to fit on and 0 held out"),
        (crossed(2, 4), 0.0, "between 0 and 1: got 0.0"),
        (crossed(2, 4), 1.0, "between 0 and 1: got 1.0"),
        ([ContrastPair("a", "b", held_out=True), ContrastPair("c", "d")], 0.25, "decided for 1 of 2 pairs"),
        ([ContrastPair("a", "b", held_out=True)] * 4, 0.25, "4 pairs split into 0 to fit on and 4 held out"),
    ],
)
def test_what_cannot_be_split_says_why(pairs, share, message):
    with pytest.raises(ValueError, match=message):
        split(pairs, share)
