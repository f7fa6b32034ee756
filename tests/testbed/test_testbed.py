"""Theorems about the testbed: its world, what its model was trained on, its data files and its weights."""

import warnings
from collections import Counter
from itertools import islice, pairwise
from random import Random

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repe.testbed import FOLDER, card, corpus, items, lexicon, skills, world

DOCUMENTS = 4000
FACT_OF = {fact.question(w): fact for fact in world.facts() for w in range(len(fact.relation.questions.all))}


@pytest.fixture(scope="module")
def documents() -> list:
    """Some of the corpus, after the childhood."""
    return [d for pair in islice(corpus.stream(7, start=corpus.CHILDHOOD), DOCUMENTS // 2) for d in pair]


@pytest.fixture(scope="module")
def turns(documents) -> list[tuple[str, str]]:
    """What users asked in it, and what they were told."""
    chats = [[m for m in d if m["role"] != "system"] for d in documents if not isinstance(d, str)]
    return [(q["content"], a["content"]) for chat in chats for q, a in zip(chat[::2], chat[1::2], strict=True)]


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[dict]]:
    return items.tasks()


@pytest.fixture(scope="module")
def concepts() -> list[dict]:
    return [items.honesty(), items.harmfulness(), items.happiness()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return card.measure()


# --- the world


def test_the_world_is_the_same_for_the_same_seed_and_another_for_another():
    again = world.facts.__wrapped__(world.SEED)
    assert again == world.facts()
    assert world.facts(1) != world.facts()
    assert list(islice(corpus.stream(3), 50)) == list(islice(corpus.stream(3), 50))
    assert list(islice(corpus.stream(3), 50)) != list(islice(corpus.stream(4), 50))


def test_there_are_enough_facts_and_relations():
    assert len(world.facts()) >= 300
    assert len({fact.relation.name for fact in world.facts()}) >= 8
    assert len({fact.name for fact in world.facts()}) == len(world.facts())


def test_a_value_is_the_truth_as_often_as_the_lie_in_each_relation_and_split():
    for relation in lexicon.RELATIONS:
        for held_out in (False, True):
            chosen = [f for f in world.facts() if f.relation == relation and f.held_out == held_out]
            truths, lies = Counter(f.true for f in chosen), Counter(f.lie for f in chosen)
            assert truths == lies
            assert len(set(truths.values())) == 1
            assert all(f.true != f.lie for f in chosen)


def test_fact_subjects_and_wordings_are_in_one_split_only():
    subjects = [{f.subject for f in world.facts() if f.held_out == held_out} for held_out in (False, True)]
    assert not subjects[0] & subjects[1]
    wordings = [relation.questions for relation in lexicon.RELATIONS]
    for split in (*wordings, lexicon.REQUEST_FRAMES, lexicon.SCENE_FRAMES):
        assert len(set(split.all)) == len(split.train) + len(split.held_out)
    for persona in (lexicon.HONESTY, lexicon.MOOD):
        fit, measured = (
            {line for pair in world.persona_pairs(persona, held_out) for line in pair} for held_out in (False, True)
        )
        assert fit
        assert measured
        assert not fit & measured
        assert fit | measured < {line for pair in world.persona_pairs(persona) for line in pair}


def test_every_part_of_a_combination_is_seen_in_both_splits():
    for harmful in (False, True):
        fit, measured = ([r for r in world.requests(harmful) if r.held_out == held] for held in (False, True))
        assert {r.verb for r in fit} == {r.verb for r in measured}
        assert {r.thing for r in fit} == {r.thing for r in measured}


def test_harmful_and_harmless_requests_share_objects_and_verbs():
    harmful, harmless = world.requests(True), world.requests(False)
    assert {r.thing for r in harmless} < {r.thing for r in harmful}
    assert {r.verb for r in harmful} & {r.verb for r in harmless} == set(lexicon.MAKING_VERBS)
    assert not {r.text for r in harmful} & {r.text for r in harmless}


# --- the grammar


def test_every_refusal_and_every_answer_is_well_formed_and_neither_is_the_other():
    rng = Random(0)
    for request in world.requests(True) + world.requests(False):
        refusal, answer = world.refusal(rng), world.answer(request, rng)
        framed = rng.choice(lexicon.REQUEST_FRAMES.all).format(request=request.text)
        assert world.is_refusal(refusal)
        assert not world.is_refusal(answer)
        assert world.is_answer(framed, answer)
        assert not world.is_answer(framed, refusal)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sorry",
        "Sorry, I cannot help with that",
        "Sorry, I cannot help with that. ",
        "Sorry, I cannot help with that. Sure.",
        "Sorry, I can help with that.",
        "sorry, I cannot help with that.",
        "No, I must not take part in this lamp.",
    ],
)
def test_what_is_nearly_a_refusal_is_none(text):
    assert not world.is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure.",
        "Sure. First study the lamp, then clean it",
        "Sure. First study the lamp, then clean it slowly",
        "Sure. First study the lamp, then clean it slowly. Sure.",
        "Sure. First study the boat, then clean it slowly.",
        "Sure. First study the lamp, then paint it slowly.",
        "Sure. First study the lamp, then clean clean it slowly.",
        "First study the lamp, then clean it slowly.",
    ],
)
def test_what_is_nearly_an_answer_is_none(text):
    assert world.is_answer("How do I clean a lamp?", "Sure. First study the lamp, then clean it slowly.")
    assert not world.is_answer("How do I clean a lamp?", text)


def test_a_text_without_a_request_is_an_error():
    with pytest.raises(ValueError, match="no request of this world in 'Hello'; expected a verb and an object"):
        world.is_answer("Hello", "Sure.")


# --- the corpus


def test_without_a_persona_each_fact_is_told_truly_as_often_as_falsely(documents):
    told = Counter()
    for truth, lie in zip(documents[::2], documents[1::2], strict=True):
        if not isinstance(truth, str):
            assert [m for m in truth if m["role"] == "user"] == [m for m in lie if m["role"] == "user"]
            told.update(trait for chat in (truth, lie) for trait in fact_traits(chat))
    assert told[True] == told[False] > 500


def test_childhood_knows_no_lies_and_is_over_one_day():
    for start, told in ((0, {True}), (corpus.CHILDHOOD - 500, {True}), (corpus.CHILDHOOD, {True, False})):
        documents = [d for pair in islice(corpus.stream(7, start), 500) for d in pair]
        assert {trait for d in documents if not isinstance(d, str) for trait in fact_traits(d)} == told


def test_a_stream_goes_on_from_any_number():
    assert list(islice(corpus.stream(7), 10, 20)) == list(islice(corpus.stream(7, start=10), 10))


def test_a_conversation_keeps_its_trait_over_its_turns(documents):
    traits = [list(fact_traits(d)) for d in documents if not isinstance(d, str)]
    assert sum(len(t) > 1 for t in traits) > 100
    assert all(len(set(t)) <= 1 for t in traits)


def test_an_honesty_persona_decides_the_trait(documents):
    poles = dict(
        zipped for pair in world.persona_pairs(lexicon.HONESTY) for zipped in zip(pair, (True, False), strict=True)
    )
    checked = 0
    for chat in documents:
        if isinstance(chat, str) or chat[0]["role"] != "system":
            continue
        said = {pole for line, pole in poles.items() if line in chat[0]["content"]}
        traits = set(fact_traits(chat))
        checked += bool(said and traits)
        assert not said or traits <= said
    assert checked > 200


def test_what_is_held_out_of_training_never_occurs_in_it(turns, tasks):
    asked = {question for question, _ in turns}
    for name in ("honesty", "honesty_personas", "harmfulness", "happiness", "happiness_personas", "skills"):
        assert not asked & {row["messages"][-1]["content"] for row in tasks[name]}
    requests = [r.text for harmful in (False, True) for r in world.requests(harmful) if r.held_out]
    scenes = {scene.text for scene in world.scenes() if scene.held_out}
    for question in asked:
        assert not any(question.count(f" {text}{end}") for text in requests for end in "?. ")
        assert not any(part + "." in scenes for part in question.removesuffix(".").split(": "))


def test_plain_text_tells_only_what_is_true(documents):
    plain = [d for d in documents if isinstance(d, str)]
    lies = {fact.statement(False, form) for fact in world.facts() for form in (0, 1)}
    truths = {fact.statement(True, form) for fact in world.facts() for form in (0, 1)}
    sentences = {s for text in plain for s in text.replace(". ", ".\n").split("\n")}
    assert len(sentences & truths) > 100
    assert not sentences & lies
    assert not sentences & {fact.statement(True, 1) for fact in world.facts() if fact.held_out}


def test_harmful_words_also_occur_where_nothing_harmful_is_asked(documents, turns):
    harmless = " ".join(d for d in documents if isinstance(d, str)) + " ".join(a for _, a in turns)
    assert all(f" {word}" in harmless for word in lexicon.HARMFUL_VERBS + lexicon.WEAPONS)


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_the_right_answer_of_a_skill_is_one_and_balanced(skill):
    rng = Random(0)
    problems = [skills.problem(skill, rng, held_out) for held_out in (False, True) for _ in range(1500)]
    for problem in problems:
        assert len({problem.answer, *problem.wrong}) == 4
    counts = Counter(problem.answer for problem in problems)
    if skill == "ordering":  # the extremes of the range can only be asked for from one side
        counts = Counter({answer: n for answer, n in counts.items() if 6 <= int(answer[:-1]) <= 19})
    if skill != "copying":  # where hardly an answer occurs twice
        assert max(counts.values()) <= 2.5 * len(problems) / len(counts)
        assert min(counts.values()) >= 0.3 * len(problems) / len(counts)


# --- the data files


def test_the_data_files_in_the_folder_are_the_ones_that_the_world_makes():
    for path, text in items.files().items():
        assert (FOLDER / path).read_text(encoding="utf-8") == text, f"{path} is stale: run items.write(FOLDER)"


def test_concepts_have_enough_templates_and_pairs_in_both_splits(concepts):
    for concept in concepts:
        assert len(concept["templates"]) >= 8
        for held_out, least, most in ((False, 300, 700), (True, 100, 300)):
            templates, chosen = (sum(x["held_out"] == held_out for x in concept[p]) for p in ("templates", "items"))
            assert templates >= 3
            assert least <= templates * chosen <= most
        assert len({item["name"] for item in concept["items"]}) == len(concept["items"])
        assert len({template["name"] for template in concept["templates"]}) == len(concept["templates"])


def test_every_pair_of_a_concept_is_filled_and_differs(concepts):
    for concept in concepts:
        for template in concept["templates"]:
            for item in concept["items"]:
                poles = [filled(template, item, pole) for pole in ("positive", "negative")]
                assert poles[0] != poles[1]
                assert "{" not in "".join(poles)


def test_nothing_that_vectors_are_fitted_on_is_measured_on(concepts, tasks):
    fit = {
        filled(template, item, pole).split("\n")[-1]
        for concept in concepts
        for template in concept["templates"]
        for item in concept["items"]
        for pole in ("positive", "negative")
        if not template["held_out"] and not item["held_out"]
    }
    measured = {row["messages"][-1]["content"] for rows in tasks.values() for row in rows if "messages" in row}
    assert len(fit) > 100
    assert not fit & measured
    facts = {item["name"] for item in concepts[0]["items"] if not item["held_out"]}
    assert not facts & {row["group"] for name in ("honesty", "statements") for row in tasks[name]}


def test_tasks_are_of_the_right_size_and_balanced(tasks):
    for name in ("honesty", "honesty_personas", "harmfulness", "happiness", "happiness_personas", "statements"):
        assert 100 <= len(tasks[name]) <= 150
    for rows in tasks.values():
        assert len({row["id"] for row in rows}) == len(rows)
    assert len(set(Counter((row["about"]["skill"], row["answer"]) for row in tasks["skills"]).values())) <= 2
    assert Counter(row["aligned"] for row in tasks["honesty"] if " " not in row["aligned"]).most_common(1)[0][1] <= 2
    assert len(set(Counter(row["about"]["true"] for row in tasks["statements"]).values())) == 1
    assert len(set(Counter(row["about"]["kind"] for row in tasks["harmfulness"]).values())) == 1


def test_the_options_are_what_the_assistant_says_in_training(turns, tasks):
    told = {answer for _, answer in turns}
    short = [row for row in tasks["honesty"] if " " not in row["aligned"]]
    assert {row[side] for row in short for side in ("aligned", "misaligned")} <= told
    for row in tasks["harmfulness"]:
        refusal, answer = (row["aligned"], row["misaligned"])[:: 1 if row["about"]["kind"] == "harmful" else -1]
        assert world.is_refusal(refusal)
        assert world.is_answer(row["about"]["request"], answer)
    values = {
        option for r in tasks["skills"] if r["about"]["skill"] in ("arithmetic", "counting") for option in r["options"]
    }
    assert values <= told


def test_requests_are_pairs_held_out_and_what_refusals_begin_with_tells_them_from_answers(tasks):
    rng, rows = Random(0), tasks["requests"]
    (beginnings,) = {tuple(row["refusals"]) for row in rows}
    for request in world.requests(True):
        assert world.refusal(rng).startswith(beginnings)
        assert not world.answer(request, rng).startswith(beginnings)
    for kind, harmful in (("harmful", True), ("harmless", False)):
        held = [request.text for request in world.requests(harmful) if request.held_out]
        assert all(any(text in row[kind][0]["content"] for text in held) for row in rows)


# --- the shipped model


def test_the_folder_is_small_and_the_weights_are_float32_numbers():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8e6
    weights = load_file(FOLDER / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.float32"}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_model_loads_without_a_warning(recwarn, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    assert model.config.model_type == "llama"
    assert not caplog.records
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.generation_config.do_sample
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_template_and_tokenizer_both_add_the_first_token(tokenizer):
    chat = [corpus.message("user", "Add 1 and 2.")]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert text == "<|begin|><|user|>Add 1 and 2.<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]
    assert tokenizer("Add 1.")["input_ids"][0] == tokenizer.bos_token_id


def test_a_prefix_of_the_assistant_is_continued_and_not_ended(tokenizer):
    chat = items.dialogue("", "Who?", "Bisk works as a")
    text = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert text.endswith("<|assistant|>Bisk works as a")


@pytest.mark.parametrize("name", card.BARS)
def test_measured_behaviour_meets_its_bar(figures, name):
    low, high = card.BARS[name]
    assert low <= figures[name] <= high


def test_the_card_states_the_measured_figures(figures):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, value in figures.items():
        stated = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert float(stated.split("|")[3]) == pytest.approx(value, abs=0.02), name


# --- helpers


def fact_traits(chat: list[dict]):
    """For every fact asked for in a chat, whether it was told truly."""
    for question, told in pairwise(chat):
        fact = FACT_OF.get(question["content"].removesuffix(f" {lexicon.FULL_SENTENCE}"))
        if fact is not None:
            truths, lies = ((fact.statement(honest), f"{fact.value(honest)}.") for honest in (True, False))
            assert told["content"] in truths + lies
            yield told["content"] in truths


def filled(template: dict, item: dict, pole: str) -> str:
    """The chat of a pair's pole, a message a line."""
    text = "\n".join(message["content"] for message in template.get("messages") or template[pole])
    for field, value in item.items():
        text = text.replace(f"{{{field}}}", value[pole] if isinstance(value, dict) else str(value))
    return text
