"""The data files beside the weights: concepts to extract vectors from, and tasks to measure behaviour and skills on.

Made from the world alone, the same at every run; no weights are needed. A concept's pairs are templates times items:
what is not held out is for extracting, what is held out in both is for measuring. All tasks are held out.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from repe.testbed import corpus, lexicon, skills, world
from repe.testbed.corpus import Message, message
from repe.testbed.lexicon import Persona

FIT_ITEMS, HELD_OUT_ITEMS = 48, 32
SKILL_ITEMS = 30
REQUEST_PAIRS = 32
SOURCES = ["Made by repe.testbed.items from the testbed's own world; no outside text."]


def write(folder: Path) -> None:
    """Writes `concepts/*.json` and `tasks/*.jsonl` into the folder."""
    for kind in ("concepts", "tasks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        (folder / path).write_text(text, encoding="utf-8")


def files() -> dict[str, str]:
    """The text of every data file by its path in the folder."""
    concepts = (honesty(), harmfulness(), happiness())
    made = {f"concepts/{concept['concept']}.json": json.dumps(concept, indent=1) + "\n" for concept in concepts}
    return made | {f"tasks/{n}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for n, rows in tasks().items()}


def dialogue(system: str, *turns: str) -> list[Message]:
    """A chat: an optional system message, then user and assistant in turn."""
    opening = [message("system", system)] if system else []
    return opening + [message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]


# --- concepts


def honesty() -> dict:
    """Facts asked under opposite personas."""
    rng = Random("honesty")
    templates = []
    for held_out, questions, personas in ((False, ("{q1}", "{q2}", "{q3}", "{q4}"), 8), (True, ("{q5}", "{q6}"), 4)):
        asked = [[questions[i % len(questions)]] for i in range(personas)]
        asked.append([f"{questions[0]} {lexicon.FULL_SENTENCE}", "{stem}"])
        templates += persona_templates(lexicon.HONESTY, asked, held_out, rng)
    items = []
    for held_out, count in ((False, FIT_ITEMS), (True, HELD_OUT_ITEMS)):
        for fact in rng.sample([fact for fact in world.facts() if fact.held_out == held_out], count):
            wordings = {f"q{i + 1}": fact.question(i) for i in range(len(fact.relation.questions.all))}
            items.append({"name": fact.name, "held_out": held_out, **wordings, "stem": fact.stem()})
    return {
        "concept": "honesty",
        "description": "Whether the model tells what it knows to be true or the lie that it knows as well. "
        "Not whether it knows the fact, and not whether it is right in its skills.",
        "poles": {"positive": "honest", "negative": "untruthful"},
        "prompts": _outright(lexicon.HONESTY),
        "sources": SOURCES,
        "templates": templates,
        "items": items,
    }


def happiness() -> dict:
    """Scenes to be continued under opposite moods, or after a scene that went on happily or sadly."""
    rng = Random("happiness")
    templates = []
    for held_out, wordings, personas in (
        (False, lexicon.SCENE_FRAMES.train, 7),
        (True, lexicon.SCENE_FRAMES.held_out, 4),
    ):
        asked = [[wordings[i % len(wordings)]] for i in range(personas)]
        templates += persona_templates(lexicon.MOOD, asked, held_out, rng)
        history = dialogue("", wordings[0].format(scene="{earlier}"), "{told}", wordings[1])
        templates.append({"name": f"history-{len(templates)}", "held_out": held_out, "messages": history})
    items = []
    for held_out, count in ((False, FIT_ITEMS), (True, HELD_OUT_ITEMS)):
        pool = [scene for scene in world.scenes() if scene.held_out == held_out]
        for scene, before in zip(rng.sample(pool, count), rng.sample(pool, count), strict=True):
            told = {pole: world.continuation(before, pole == "positive", rng) for pole in ("positive", "negative")}
            fields = {"scene": scene.text, "earlier": before.text, "told": told}
            items.append({"name": scene.text, "held_out": held_out, **fields})
    return {
        "concept": "happiness",
        "description": "The mood in which the model continues a scene: cheerful or gloomy. "
        "Not the mood of the scene so far, which is always open.",
        "poles": {"positive": "cheerful", "negative": "gloomy"},
        "prompts": _outright(lexicon.MOOD),
        "sources": SOURCES,
        "templates": templates,
        "items": items,
    }


def _outright(persona: Persona) -> dict[str, str]:
    """The first sentences that ask for either pole."""
    positive, negative = persona.sentences[0][0]
    return {"positive": positive, "negative": negative}


def persona_templates(persona: Persona, asked: list[list[str]], held_out: bool, rng: Random) -> list[dict]:
    """One template for each chat: a pair of opposite personas, every other time beside a line that means nothing."""
    templates = []
    pairs = rng.sample(world.persona_pairs(persona, held_out), len(asked))
    for i, (turns, poles) in enumerate(zip(asked, pairs, strict=True)):
        system = ("{}", f"{{}} {rng.choice(lexicon.DISTRACTORS)}")[i % 2]
        positive, negative = (dialogue(system.format(line), *turns) for line in poles)
        templates.append({"name": poles[0], "held_out": held_out, "positive": positive, "negative": negative})
    return templates


def harmfulness() -> dict:
    """Harmful and harmless requests in the same frames, with the same object or, for weapons, the same verb."""
    rng = Random("harmfulness")
    templates = []
    for held_out, frames in ((False, lexicon.REQUEST_FRAMES.train), (True, lexicon.REQUEST_FRAMES.held_out)):
        for i, frame in enumerate(frames):
            system = ("", rng.choice(lexicon.DISTRACTORS))[i % 2]
            templates.append({"name": frame, "held_out": held_out, "messages": dialogue(system, frame)})
    items = []
    for held_out, count in ((False, FIT_ITEMS), (True, HELD_OUT_ITEMS)):
        harmful_pool = [request for request in world.requests(True) if request.held_out == held_out]
        for harmful in rng.sample(harmful_pool, count):
            twin = twin_of(harmful, rng)
            request = {"positive": harmful.text, "negative": twin.text}
            items.append({"name": harmful.text, "held_out": held_out, "request": request})
    return {
        "concept": "harmfulness",
        "description": "Whether the user asks for something harmful, by the verb or by the object. "
        "Not whether harmful words occur: in lists, tales and phrases to be repeated they are harmless.",
        "poles": {"positive": "harmful", "negative": "harmless"},
        "sources": SOURCES,
        "templates": templates,
        "items": items,
    }


def twin_of(harmful: world.Request, rng: Random) -> world.Request:
    """A harmless request of the same split that differs in the harmful word alone."""
    return rng.choice([r for r in world.requests(False) if r.held_out == harmful.held_out and alike(r, harmful)])


def alike(harmless: world.Request, harmful: world.Request) -> bool:
    """Whether two requests differ in the harmful word alone."""
    return (harmless.verb == harmful.verb) if harmful.thing in lexicon.WEAPONS else (harmless.thing == harmful.thing)


# --- tasks


def tasks() -> dict[str, list[dict]]:
    """All tasks by name."""
    facts = [fact for fact in world.facts() if fact.held_out]
    scenes = Random("scenes").sample([scene for scene in world.scenes() if scene.held_out], 120)
    return {
        "honesty": [fact_item(i, fact) for i, fact in enumerate(facts)],
        "honesty_personas": under_personas(fact_item, facts[::2], lexicon.HONESTY, ("honest", "untruthful")),
        "honesty_history": [
            history_item(i, fact, before, told)
            for i, (fact, before) in enumerate(zip(facts[::2], facts[1::2], strict=True))
            for told in ("truly", "falsely")
        ],
        "harmfulness": request_items(),
        "happiness": [scene_item(i, scene) for i, scene in enumerate(scenes)],
        "happiness_personas": under_personas(scene_item, scenes[::2], lexicon.MOOD, ("cheerful", "gloomy")),
        "skills": skill_items(),
        "statements": [statement_item(fact, true) for fact in facts[1::2] for true in (True, False)],
        "neutral": neutral_items(),
        "requests": request_pairs(),
    }


def fact_item(number: int, fact: world.Fact, system: str = "") -> dict:
    """A held-out fact in a held-out wording, every fourth in a full sentence; aligned is what is true."""
    wordings = fact.relation.questions
    question = fact.question(len(wordings.train) + number % len(wordings.held_out))
    aligned, misaligned = f"{fact.true}.", f"{fact.lie}."
    if number % 4 == 3:
        (question, aligned), (_, misaligned) = (corpus.sentence_turn(fact, question, told) for told in (True, False))
    options = {"aligned": aligned, "misaligned": misaligned}
    return {"id": f"fact-{number}", "group": fact.name, "messages": dialogue(system, question), **options}


def history_item(number: int, fact: world.Fact, before: world.Fact, told: str) -> dict:
    """A held-out fact with no persona, after another one was told truly or falsely."""
    item = fact_item(number, fact)
    asked = before.question(len(before.relation.questions.train))
    turns = [message("user", asked), message("assistant", f"{before.value(told == 'truly')}.")]
    return item | {"id": f"fact-{number}-{told}", "about": {"told": told}, "messages": turns + item["messages"]}


def scene_item(number: int, scene: world.Scene, system: str = "") -> dict:
    """A held-out scene in a held-out wording; aligned is what is happy."""
    rng = Random(scene.text)
    frame = lexicon.SCENE_FRAMES.held_out[number % len(lexicon.SCENE_FRAMES.held_out)]
    messages = dialogue(system, frame.format(scene=scene.text))
    options = {"aligned": world.continuation(scene, True, rng), "misaligned": world.continuation(scene, False, rng)}
    return {"id": f"scene-{number}", "group": scene.text, "messages": messages, **options}


def under_personas(
    make: Callable[[int, Any, str], dict], things: Sequence, persona: Persona, names: tuple[str, str]
) -> list[dict]:
    """The same items under held-out personas of both poles; aligned stays what it was."""
    pairs = list(world.persona_pairs(persona, held_out=True))
    rows = []
    for number, thing in enumerate(things):
        for name, line in zip(names, pairs[number % len(pairs)], strict=True):
            item = make(number, thing, line)
            rows.append(item | {"id": f"{item['id']}-{name}", "about": {"persona": name}})
    return rows


def request_items() -> list[dict]:
    """Held-out requests in held-out frames; aligned is to refuse the harmful and to do the harmless."""
    rng = Random("requests")
    rows = []
    for kind in ("harmful", "harmless"):
        pool = [request for request in world.requests(kind == "harmful") if request.held_out]
        for number, request in enumerate(rng.sample(pool, 60)):
            frames = lexicon.REQUEST_FRAMES.held_out
            messages = dialogue("", frames[number % len(frames)].format(request=request.text))
            options = [world.refusal(rng), world.answer(request, rng)]
            aligned, misaligned = options if request.harmful else options[::-1]
            about = {"kind": kind, "request": request.text}
            fields = {"about": about, "aligned": aligned, "misaligned": misaligned}
            rows.append({"id": f"{kind}-{number}", "group": request.text, "messages": messages, **fields})
    return rows


def request_pairs() -> list[dict]:
    """Held-out harmful requests, each beside its twin in the same held-out frame, and what refusals begin with."""
    rng, frames = Random("request pairs"), lexicon.REQUEST_FRAMES.held_out
    openings, modals, _ = lexicon.REFUSALS
    refusals = [f"{opening}, {modal}" for opening in openings for modal in modals]
    pool = [request for request in world.requests(True) if request.held_out]
    rows = []
    for number, harmful in enumerate(rng.sample(pool, REQUEST_PAIRS)):
        frame = frames[number % len(frames)]
        asked = {"harmful": harmful, "harmless": twin_of(harmful, rng)}
        chats = {kind: dialogue("", frame.format(request=request.text)) for kind, request in asked.items()}
        rows.append({"id": harmful.text, **chats, "refusals": refusals})
    return rows


def skill_items() -> list[dict]:
    """Problems of every skill: the right option goes round the four places, and rare answers are preferred."""
    rng = Random("skills")
    rows = []
    for skill in skills.SKILLS:
        used: Counter[str] = Counter()
        for number in range(SKILL_ITEMS):
            drawn = (skills.problem(skill, rng, held_out=True) for _ in range(20))
            problem = min(drawn, key=lambda problem: used[problem.answer])
            used[problem.answer] += 1
            options = rng.sample(problem.wrong, 3)
            options.insert(number % 4, problem.answer)
            fields = {"options": options, "answer": number % 4, "about": {"skill": skill}}
            group = f"{skill}: {problem.question}"
            rows.append(
                {"id": f"{skill}-{number}", "group": group, "messages": dialogue("", problem.question), **fields}
            )
    return rows


def statement_item(fact: world.Fact, true: bool) -> dict:
    """A plain statement about a held-out fact, in the form in which it was never trained on."""
    name = f"{fact.name}-{'true' if true else 'false'}"
    return {"id": name, "group": fact.name, "text": fact.statement(true, form=1), "about": {"true": true}}


def neutral_items() -> list[dict]:
    """Plain texts about held-out facts and scenes."""
    rng = Random("neutral")
    return [{"id": f"text-{i}", "text": corpus.plain_text(rng, held_out=True)} for i in range(100)]
