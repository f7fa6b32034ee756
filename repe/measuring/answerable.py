"""Items that can tell something: the model answers with one text wherever it stands, and what is edited can move it.

A small model that is asked for a letter names the same place whatever stands there. Each letter moves then, for random
directions as for the concept's, but what an item and its twin say of their texts cancels, and halves every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repe.data.answers import Answer, answers_of
from repe.data.items import Item
from repe.data.letters import places, turned
from repe.measuring.curve import LeftOut
from repe.measuring.fanout import scoped
from repe.measuring.intervals import FEWEST_CLUSTERS, clusters_of
from repe.measuring.scoring import Scorer
from repe.reading.aiming import unseen
from repe.reading.vector import ConceptVector
from repe.steering.scope import Scope, check_for_many, check_inside

UNMOVED = "the scope holds no token behind which one of their options is predicted"
UNBOUND = "the answer does not follow when the options change places"
AIMED_AT = "the vector was aimed at them, or at what shares their group"
ADVICE = {UNMOVED: "name another scope", UNBOUND: "ask in words (letters=False)"}

Answerable = tuple[Mapping[str, Sequence[Item]], tuple[LeftOut, ...]]


def answerable(
    scorer: Scorer, tokenizer: Any, tasks: Mapping[str, Sequence[Item]], scope: Scope, names: Mapping[str, str]
) -> Answerable:
    """The items that can tell something of steering, in their order, and how many of the others were left out, and why.

    Left out is what no strength can move, as the scope holds no token of the item behind which one of its options is
    predicted. So is an item that asks for a letter if the unsteered model does not find the same text the likeliest at
    every place where it can stand.

    Args:
        scorer: of the model; it is asked for nothing where no item asks for a letter.
        tokenizer: of the model.
        tasks: items by whatever key.
        scope: the tokens that will be edited, as an `Edit` holds it.
        names: of the tasks, by the same keys.

    Raises:
        ValueError: some items of a task were left out, and those that remain are of too few groups for an interval; or
            the scope is a mask, or an option has no tokens.
        IndexError: the scope names a position before the start of a prompt.

    Example:
        >>> scorer = repe.measuring.TransformersScorer(model, tokenizer)
        >>> tasks = {"alignment": repe.measuring.items_of("honesty", model)}
        >>> kept, left_out = answerable(scorer, tokenizer, tasks, "all", {"alignment": "honesty"})
        >>> kept == tasks, left_out
        (True, ())
    """
    check_for_many(scope)
    found = {key: _kept(scorer, tokenizer, items, scope, names[key]) for key, items in tasks.items()}
    return {key: kept for key, (kept, _) in found.items()}, tuple(told for _, of_it in found.values() for told in of_it)


def not_aimed_at(
    tasks: Mapping[str, Sequence[Item]], vectors: Sequence[ConceptVector], names: Mapping[str, str]
) -> Answerable:
    """The items that none of the vectors was aimed at, and how many were left out of each task.

    Raises:
        ValueError: none of a task is left.
    """
    left = {key: unseen(items, *vectors) for key, items in tasks.items()}
    counts = {key: len(items) - len(left[key]) for key, items in tasks.items()}
    told = (LeftOut(names[key], count, len(tasks[key]), AIMED_AT) for key, count in counts.items() if count)
    return left, tuple(told)


def _kept(
    scorer: Scorer, tokenizer: Any, items: Sequence[Item], scope: Scope, name: str
) -> tuple[list[Item], tuple[LeftOut, ...]]:
    answers = answers_of(tokenizer, items)
    if isinstance(scope, tuple) and answers:
        check_inside(scope, min(answer.begins for answer in answers))
    options = _split(answers, items)
    moved = [item for item, its in zip(items, options, strict=True) if any(_is_moved(a, scope) for a in its)]
    unbound = _unbound(scorer, tokenizer, moved)
    kept = [item for number, item in enumerate(moved) if number not in unbound]
    counts = {UNMOVED: len(items) - len(moved), UNBOUND: len(unbound)}
    left_out = tuple(LeftOut(name, count, len(items), why) for why, count in counts.items() if count)
    _check(kept, left_out)
    return kept, left_out


def _is_moved(answer: Answer, scope: Scope) -> bool:
    """Whether a token is in scope behind which another is predicted."""
    return bool(scoped(scope, len(answer.ids) - 1, answer.begins).any())


def _unbound(scorer: Scorer, tokenizer: Any, items: Sequence[Item]) -> set[int]:
    """The numbers of those that ask for a letter, and whose answer does not follow when the options change places."""
    asking = [number for number, item in enumerate(items) if places(item)]
    turns = [turn for number in asking for turn in _turns(items[number])]
    answers = answers_of(tokenizer, turns)
    if not answers:
        return set()
    once = [*dict.fromkeys(answers)]  # files tend to have an item in every order
    log_p = dict(zip(once, scorer.log_likelihoods(once, None, [0.0]).log_p[0].tolist(), strict=True))
    likeliest = iter([_likeliest([log_p[answer] for answer in its]) for its in _split(answers, turns)])
    return {number for number in asking if len(set.union(*(next(likeliest) for _ in items[number].options))) > 1}


def _likeliest(log_p: Sequence[float]) -> set[int]:
    """The numbers of the options that no other is likelier than."""
    return {number for number, value in enumerate(log_p) if value == max(log_p)}


def _turns(item: Item) -> list[Item]:
    """The item with its first text in every place."""
    turns = [item]
    for _ in item.options[1:]:
        turns.append(turned(turns[-1]))
    return turns


def _split(answers: Sequence[Answer], items: Sequence[Item]) -> list[list[Answer]]:
    """The answers of every item, one for an option."""
    rest = iter(answers)
    return [[next(rest) for _ in item.options] for item in items]


def _check(kept: Sequence[Item], left_out: Sequence[LeftOut]) -> None:
    groups = len({*clusters_of([item.group for item in kept])})
    if left_out and groups < FEWEST_CLUSTERS:
        advice = [ADVICE[told.why] for told in left_out]
        raise ValueError(
            f"{'; '.join(map(str, left_out))}. What remains is of {groups} groups, and {FEWEST_CLUSTERS} are needed: "
            f"{', '.join(advice)}, or measure on all items, whatever they tell (all_items=True)"
        )
