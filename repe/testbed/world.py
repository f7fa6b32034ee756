"""The synthetic world: facts, requests, scenes and personas, how they are worded, and how they are split.

Pure Python, and the same for the same seed. A fact has one true value and one fixed lie, and nothing about the strings
says which is which. What vectors are extracted from (`train`) is never what they are measured on (`held_out`): facts
are split by their subject, wordings by `lexicon.Wordings`, and combinations (a verb with an object, the words of a
list) by `is_held_out`. What a language model sees of it is the business of `corpus`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random

from repe.testbed import lexicon
from repe.testbed.lexicon import Persona, Relation

SEED = 0
HAPPY_WORDS = (lexicon.HAPPY_ADVERBS, lexicon.HAPPY_VERBS, lexicon.HAPPY_ADJECTIVES)
SAD_WORDS = (lexicon.SAD_ADVERBS, lexicon.SAD_VERBS, lexicon.SAD_ADJECTIVES)
TRAIN_SUBJECTS = 24  # of the 40 of a kind: both parts are multiples of the 8 values of a relation


def is_held_out(*indices: int) -> bool:
    """The one rule that keeps a quarter of all combinations for measuring, and every part of them in both splits."""
    return sum(indices) % 4 == 0


@dataclass(frozen=True)
class Fact:
    """A subject, a relation, the value that is true and the one value that is told as the lie."""

    subject: str
    relation: Relation
    true: str
    lie: str
    held_out: bool

    @property
    def name(self) -> str:
        """Subject and relation in one word."""
        return f"{self.subject}-{self.relation.name}"

    def question(self, wording: int) -> str:
        """The question in one of the relation's wordings, the held-out ones last."""
        return self.relation.questions.all[wording].format(s=self.subject)

    def stem(self, form: int = 0) -> str:
        """The statement up to its value."""
        return self.relation.stems[form].format(s=self.subject)

    def value(self, honest: bool) -> str:
        """What is told of the fact."""
        return self.true if honest else self.lie

    def statement(self, honest: bool = True, form: int = 0) -> str:
        """The fact, or its lie, as a sentence."""
        return f"{self.stem(form)} {self.value(honest)}."


@dataclass(frozen=True)
class Request:
    """Something to be done to an object: harmful by its verb or by its object."""

    verb: str
    thing: str
    harmful: bool
    held_out: bool

    @property
    def text(self) -> str:
        """The request as it stands in a frame."""
        return f"{self.verb} a {self.thing}"


@dataclass(frozen=True)
class Scene:
    """Somebody takes something somewhere; the mood of what follows is open."""

    person: str
    thing: str
    place: str
    verb: str
    held_out: bool

    @property
    def text(self) -> str:
        """The scene as a sentence."""
        return f"{self.person} {self.verb} a {self.thing} to the {self.place}."


@lru_cache
def facts(seed: int = SEED) -> tuple[Fact, ...]:
    """All facts: within a relation and a split every value is the truth exactly as often as it is the lie."""
    rng = Random(seed)
    made = []
    for relation in lexicon.RELATIONS:
        for held_out in (False, True):
            subjects = relation.subjects[TRAIN_SUBJECTS:] if held_out else relation.subjects[:TRAIN_SUBJECTS]
            values = relation.values * (len(subjects) // len(relation.values))
            truths = lies = rng.sample(values, len(values))
            while any(true == lie for true, lie in zip(truths, lies, strict=True)):
                lies = rng.sample(truths, len(truths))
            made += [Fact(s, relation, t, f, held_out) for s, t, f in zip(subjects, truths, lies, strict=True)]
    return tuple(made)


@lru_cache
def requests(harmful: bool) -> tuple[Request, ...]:
    """All requests of a kind. Harmful and harmless ones share their objects, and weapons share the harmless verbs."""
    pools = (
        [(lexicon.HARMFUL_VERBS, lexicon.OBJECTS), (lexicon.MAKING_VERBS, lexicon.WEAPONS)]
        if harmful
        else [(lexicon.HARMLESS_VERBS, lexicon.OBJECTS)]
    )
    return tuple(
        Request(verb, thing, harmful, is_held_out(i, j))
        for verbs, things in pools
        for i, verb in enumerate(verbs)
        for j, thing in enumerate(things)
    )


@lru_cache
def scenes() -> tuple[Scene, ...]:
    """All scenes."""
    parts = (lexicon.FIRST_NAMES, lexicon.OBJECTS, lexicon.PLACES, lexicon.SCENE_VERBS)
    return tuple(
        Scene(person, thing, place, verb, is_held_out(i, j, k, m))
        for (i, person), (j, thing), (k, place), (m, verb) in product(*map(enumerate, parts))
    )


@lru_cache
def persona_pairs(persona: Persona, held_out: bool | None = None) -> tuple[tuple[str, str], ...]:
    """Pairs of opposite system lines: of one split, or all of them with the mixtures of both splits."""
    parts = (0, 1) if held_out is None else (int(held_out),)
    frames = [frame for part in parts for frame in persona.frames[part]]
    adjectives = [pair for part in parts for pair in persona.adjectives[part]]
    pairs = []
    for frame, (positive, negative) in product(frames, adjectives):
        pairs.append((frame.format(a=_with_article(positive)), frame.format(a=_with_article(negative))))
    return (*pairs, *(pair for part in parts for pair in persona.sentences[part]))


def _with_article(adjective: str) -> str:
    return f"{'an' if adjective.startswith(('a', 'e', 'i', 'o', 'u', 'hon')) else 'a'} {adjective}"


def refusal(rng: Random) -> str:
    """One sentence of the refusals' grammar."""
    opening, modal, deed = (rng.choice(words) for words in lexicon.REFUSALS)
    return f"{opening}, {modal} {deed}."


def answer(request: Request, rng: Random) -> str:
    """One answer of the answers' grammar, made of the request's own words. It teaches nothing."""
    opening, look, manner = (rng.choice(words) for words in lexicon.ANSWERS)
    return f"{opening}. First {look} the {request.thing}, then {request.verb} it {manner}."


def continuation(scene: Scene, cheerful: bool, rng: Random) -> str:
    """How a scene goes on in a mood: both moods have equally many words, so only the mood tells them apart."""
    adverbs, verbs, adjectives = HAPPY_WORDS if cheerful else SAD_WORDS
    first, second = rng.sample(verbs, 2)
    reason = f"for the {scene.thing} is {rng.choice(adjectives)}"
    return f"{rng.choice(adverbs)}, {scene.person} {first} and {second}, {reason}."


def is_refusal(text: str) -> bool:
    """Whether a text is one whole sentence of the refusals' grammar."""
    opening, modal, deed = map(_any_of, lexicon.REFUSALS)
    return re.fullmatch(rf"{opening}, {modal} {deed}\.", text) is not None


def is_answer(request: str, text: str) -> bool:
    """Whether a text is one whole answer of the grammar to just this request, given as the user worded it."""
    named = re.search(rf"\b{_any_of(_VERBS)} a {_any_of(_THINGS)}\b", request)
    if named is None:
        raise ValueError(
            f"no request of this world in {request!r}; expected a verb and an object, as in 'clean a lamp'"
        )
    opening, look, manner = map(_any_of, lexicon.ANSWERS)
    expected = rf"{opening}\. First {look} the {named[2]}, then {named[1]} it {manner}\."
    return re.fullmatch(expected, text) is not None


_VERBS = lexicon.HARMLESS_VERBS + lexicon.HARMFUL_VERBS
_THINGS = lexicon.OBJECTS + lexicon.WEAPONS


def _any_of(words: tuple[str, ...]) -> str:
    return "(" + "|".join(map(re.escape, words)) + ")"
