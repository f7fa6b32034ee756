"""The library's concepts: the schema, the balance of their poles, every family's template, and no concept in noise."""

import json
import random
import warnings
from collections import Counter
from dataclasses import replace
from statistics import mean

import pytest
import torch
import transformers

import repe
from repe.data.audit import WORDING
from repe.data.catalogue import LIBRARY, find, find_task
from repe.data.concept import load_concept
from repe.data.items import load_items, load_requests, load_texts
from repe.data.pairs import split
from repe.models.chats import encode_chat, render
from repe.models.load import home_of
from repe.reading import extract as extraction
from repe.reading import store
from tests.chat_templates import TEMPLATES

NAMES = sorted(path.stem for path in (LIBRARY / "concepts").glob("*.json"))
ASKED_FOR = {
    "honesty", "harmfulness", "refusal", "happiness", "fairness", "sycophancy", "confidence", "formality",
    "power-seeking", "truthfulness", "toxicity", "hallucination",
}  # fmt: skip
SIZES = {
    "vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=1024)
    ),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: make().eval() for name, make in FAMILIES.items()}


def content(name):
    return json.loads(find(name).read_text())


def test_the_library_has_the_concepts_that_it_should():
    assert set(NAMES) == ASKED_FOR == set(repe.concepts())


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_says_what_it_is_and_what_it_is_not(name):
    concept = load_concept(find(name))
    assert concept.name == name
    assert repe.concepts()[name] == concept.description
    assert " not " in concept.description
    assert concept.description.count(". ") >= 1
    assert concept.poles.keys() == concept.prompts.keys() == {"positive", "negative"}
    assert concept.sources


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_is_made_of_enough_and_holds_out_enough(name):
    parts, concept = content(name), load_concept(find(name))
    for kind, least in (("templates", 8), ("items", 25)):
        sides = Counter(part["held_out"] for part in parts[kind])
        assert sides[False] >= least
        assert sides[True] >= 4
    fit, held = split(concept.pairs)
    assert len(concept.pairs) == len(fit) + len(held)
    assert len(fit) >= 200
    assert len(held) >= 80  # so that chance stays below .7, with a probability of 1e-4 that it does not


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_passes_its_audit(name, loaded_testbed):
    """Its limits: lengths within 10% and the same ending, or the direction could be either; no word in a third more of
    one pole's texts, and single words that order at most 90% of the held-out pairs, unless the file says why.
    """
    for tokenizer in (None, loaded_testbed[1]):
        found = repe.audit(name, tokenizer)
        assert not found.advice, str(found)
        positive, negative = found.lengths
        assert abs(positive / negative - 1) < 0.1
        assert found.endings == 0
        assert found.wording <= WORDING or load_concept(find(name)).wording


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_concept_renders_on_the_templates_of_many_families(name, family, loaded_testbed):
    """Each text keeps all it says, differs from its other pole, and ends at the same kind of place."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(loaded_testbed[1].name_or_path)
    tokenizer.chat_template = TEMPLATES[family]
    pairs = random.Random(name).sample(load_concept(find(name)).pairs, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no system role
        for pair in pairs:
            poles = (pair.positive, pair.negative)
            texts = [render(tokenizer, chat) for chat in poles]
            assert texts[0] != texts[1]
            for chat, text in zip(poles, texts, strict=True):
                assert all(message["content"].strip() in text for message in chat)
            ids = [encode_chat(tokenizer, chat) for chat in poles]
            assert ids[0][-1] == ids[1][-1]
            assert all(row.count(tokenizer.bos_token_id) <= 1 for row in ids) or family == "llama-2"


@pytest.mark.parametrize("name", NAMES)
def test_behaviour_items_are_balanced(name, loaded_testbed):
    """Options of one length, no letter and no yes that is mostly the aligned one, and no text of the concept's own."""
    items = load_items(find_task(name))
    assert len(items) >= 40
    assert all(len(item.options) == 2 and item.answer == 0 and item.group for item in items)
    assert all(item.prompt[-1]["role"] == "user" for item in items)
    lengths = [[len(option) for option in item.options] for item in items]
    aligned, other = (mean(length[i] for length in lengths) for i in (0, 1))
    assert abs(aligned / other - 1) < 0.2
    for short in ("A", "B", "Yes", "No"):
        both = Counter(item.options.index(short) for item in items if short in item.options)
        assert not both or 0.3 <= both[0] / both.total() <= 0.7, (short, both)
    asked = {item.prompt[-1]["content"] for item in items}
    assert len(asked) == len(items)
    assert not asked & {message["content"] for pair in load_concept(find(name)).pairs for message in pair.positive}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found_where_nothing_is(name, family, models, loaded_testbed):
    """Random weights, and pairs whose poles are exchanged at random: held-out pairs are ordered by chance."""
    rng = random.Random(f"{name} {family}")
    fit, held = split(load_concept(find(name)).pairs)
    chosen = [*rng.sample(fit, 64), *rng.sample(held, 80)]
    turned = [
        replace(pair, positive=pair.negative, negative=pair.positive) if rng.random() < 0.5 else pair for pair in chosen
    ]
    vector = repe.extract(models[family], loaded_testbed[1], turned, enough=None, writes=False)
    assert vector.provenance["held_out_pairs"] == 80
    assert vector.accuracy.max() <= 0.7


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_is_extracted_by_its_name(name, models, loaded_testbed):
    vector = repe.extract(models["llama"], loaded_testbed[1], name, enough=None, writes=False)
    assert vector.concept == name
    assert vector.provenance["pairs"] + vector.provenance["held_out_pairs"] == len(load_concept(find(name)).pairs)


@pytest.mark.parametrize("name", ["happiness", "harmfulness", "honesty"])
def test_shipped_vectors_are_of_these_pairs_and_of_this_rendering(name, testbed, monkeypatch):
    monkeypatch.setattr("repe.reading.extract.extract", lambda *_, **__: pytest.fail("the shipped vector is stale"))
    made = store.resolve(testbed[0], name, testbed[1]).provenance
    assert made["rendering"] == extraction.rendering_of(testbed[1])
    assert made["pairs_digest"] == extraction.digest_of(load_concept(find(name, home_of(testbed[0]))).pairs)


def test_general_tasks_are_there():
    skills = load_items(find_task("skills"))
    assert len(skills) >= 100
    assert Counter(item.answer for item in skills) == {i: len(skills) / 4 for i in range(4)}
    texts = load_texts(find_task("neutral"))
    assert len(texts) >= 40
    assert all(len(text.split()) >= 50 for text in texts)


def test_requests_are_mild_and_differ_in_harm_alone_as_far_as_words_can():
    """Each pair is alike in how it begins, how it ends and how long it is; no text twice, nor in a concept's pairs."""
    pairs = load_requests(find_task("requests"))
    assert len(pairs) == 32
    asked = [[pair.harmful[0]["content"], pair.harmless[0]["content"]] for pair in pairs]
    assert all(len(pair.harmful) == len(pair.harmless) == 1 and not pair.refusals for pair in pairs)
    assert len({text for texts in asked for text in texts}) == 64
    for harmful, harmless in asked:
        assert harmful.split()[0] == harmless.split()[0]
        assert harmful[-1] == harmless[-1]
        assert abs(len(harmful) / len(harmless) - 1) < 0.15
    lengths = [mean(map(len, texts)) for texts in zip(*asked, strict=True)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.03
    told = {m["content"] for name in NAMES for pair in load_concept(find(name)).pairs for m in pair.positive}
    assert not told & {text for texts in asked for text in texts}
