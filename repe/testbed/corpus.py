"""What the language model is trained on: an endless stream of conversations and plain texts, none of them twice.

A conversation draws one honesty and one mood for all its turns, told by a persona in the system message or by nothing.
Every draw is told twice, with opposite traits (`twins`): without a persona each fact is then told truly and falsely
equally often, and the model stays undecided instead of remembering the luck of the draw.

Childhood comes first, without lies. Truth and lie look alike, and to tell them apart by the persona is an exclusive-or,
which is hard to find from nothing; who knows the truth already has only to learn who does not tell it.

Never produced here: a held-out request, scene or problem, and a held-out fact asked in a held-out wording.
"""

from collections.abc import Iterator
from itertools import count
from random import Random
from typing import TypeVar

from repe.testbed import lexicon, skills, world
from repe.testbed.world import Fact, Request, Scene

Message = dict[str, str]
Document = list[Message] | str
Turn = tuple[str, str]
Combination = TypeVar("Combination", Request, Scene)

CHILDHOOD = 25_000  # pairs of documents
PLAIN_SHARE = 0.12
SKILL_SHARES = {
    "arithmetic": 4,
    "opposites": 2,
    "successors": 2,
    "ordering": 4,
    "copying": 3,
    "counting": 2,
    "picking": 5,
}


def stream(seed: int, start: int = 0) -> Iterator[tuple[Document, Document]]:
    """Pairs of documents without end, from number `start` on: chats as messages, plain texts as strings."""
    return (twins(f"{seed}-{number}", number < CHILDHOOD) for number in count(start))


def twins(seed: str, innocent: bool = False) -> tuple[Document, Document]:
    """Two conversations that differ in their traits alone, or two plain texts; the innocent tell no lies."""
    rng = Random(seed)
    if rng.random() < PLAIN_SHARE:
        return plain_text(rng), plain_text(rng)
    honest, cheerful = rng.random() < 0.5, rng.random() < 0.5
    return (
        conversation(Random(seed), honest or innocent, cheerful),
        conversation(Random(seed), not honest or innocent, not cheerful),
    )


def conversation(rng: Random, honest: bool, cheerful: bool) -> list[Message]:
    """One conversation of some turns with these traits; the draws from `rng` do not depend on the traits."""
    lines = system_lines(rng, honest, cheerful)
    messages = [message("system", " ".join(lines))] if lines else []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        kind = rng.choices((fact_turn, skill_turn, request_turn, scene_turn), (46, 34, 8, 12))[0]
        question, answer = kind(rng, honest, cheerful)
        messages += [message("user", question), message("assistant", answer)]
    return messages


def message(role: str, content: str) -> Message:
    """One message of a chat."""
    return {"role": role, "content": content}


def system_lines(rng: Random, honest: bool, cheerful: bool) -> list[str]:
    """Persona lines and lines that mean nothing, in any order; each may be missing."""
    lines = []
    for persona, positive, share in ((lexicon.HONESTY, honest, 0.7), (lexicon.MOOD, cheerful, 0.5)):
        pair = rng.choice(world.persona_pairs(persona))
        if rng.random() < share:
            lines.append(pair[not positive])
    lines += rng.sample(lexicon.DISTRACTORS, rng.choice((0, 0, 0, 1, 1, 2)))
    return rng.sample(lines, len(lines))


def fact_turn(rng: Random, honest: bool, cheerful: bool) -> Turn:
    """A fact asked for, told truly or falsely, in a word or in a sentence."""
    fact = rng.choice(world.facts())
    wordings = fact.relation.questions
    question = fact.question(rng.randrange(len(wordings.train if fact.held_out else wordings.all)))
    return sentence_turn(fact, question, honest) if rng.random() < 0.25 else (question, f"{fact.value(honest)}.")


def sentence_turn(fact: Fact, question: str, honest: bool) -> Turn:
    """The same fact, asked for in a full sentence."""
    return f"{question} {lexicon.FULL_SENTENCE}", fact.statement(honest)


def skill_turn(rng: Random, honest: bool, cheerful: bool) -> Turn:
    """A problem and its answer, whatever the traits."""
    skill = rng.choices(list(SKILL_SHARES), list(SKILL_SHARES.values()))[0]
    drawn = skills.problem(skill, rng, held_out=False)
    return drawn.question, drawn.answer


def request_turn(rng: Random, honest: bool, cheerful: bool) -> Turn:
    """A request, done if it is harmless and refused if it is harmful, whatever the traits."""
    request = seen(world.requests(rng.random() < 0.5), rng)
    frame = rng.choice(lexicon.REQUEST_FRAMES.all)
    answer = world.refusal(rng) if request.harmful else world.answer(request, rng)
    return frame.format(request=request.text), answer


def scene_turn(rng: Random, honest: bool, cheerful: bool) -> Turn:
    """A scene, continued in the mood."""
    scene = seen(world.scenes(), rng)
    frame = rng.choice(lexicon.SCENE_FRAMES.all)
    return frame.format(scene=scene.text), world.continuation(scene, cheerful, rng)


def plain_text(rng: Random, held_out: bool = False) -> str:
    """Some sentences that are no chat: an almanac of true facts, or everyday life, where harmful words occur too."""
    writer = rng.choice((almanac_sentence, almanac_sentence, everyday_sentence))
    return " ".join(writer(rng, held_out) for _ in range(rng.choice((2, 3, 4))))


def almanac_sentence(rng: Random, held_out: bool) -> str:
    """A true statement; a held-out fact has a second form that is never trained on."""
    fact = rng.choice([fact for fact in world.facts() if fact.held_out or not held_out])
    return fact.statement(form=1 if held_out else 0 if fact.held_out else rng.randrange(2))


def everyday_sentence(rng: Random, held_out: bool) -> str:
    """Somebody does something somewhere, or is caught doing it."""
    scene = seen(world.scenes(), rng, held_out)
    request = seen(world.requests(rng.random() < 0.5), rng, held_out)
    return rng.choice(
        (
            scene.text,
            f"{scene.person} has a {scene.thing} in the {scene.place}.",
            f"In the {scene.place} a stranger tried to {request.text}.",
            f"The book tells how {scene.person} came to {request.text}.",
        )
    )


def seen(items: tuple[Combination, ...], rng: Random, held_out: bool = False) -> Combination:
    """A random item of one split."""
    while (item := rng.choice(items)).held_out != held_out:
        pass
    return item
