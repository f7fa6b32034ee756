"""Scoring: probabilities are those of the model, answer by answer and token by token."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, LlamaModel

import repe
from repe.data.answers import Answer
from repe.data.items import Item
from repe.measuring import scoring
from repe.measuring.scoring import TransformersScorer, log_likelihoods
from repe.models.logits import check_causal, divergence, log_probabilities, log_probability
from repe.models.tokens import encode
from repe.steering import Edit
from tests import oracles, zoo
from tests.oracles import plain_vector

ITEMS = [
    Item("is it so", (" yes", " no"), 0),
    Item(({"role": "user", "content": "count"},), ("one", "two three", "4"), 2),
    Item("a", ("b", "cde"), 1),
]


def log_likelihood_by_hand(model, tokenizer, item, option):
    """One token at a time, nothing padded and nothing cached."""
    ids = encode(tokenizer, item.prompt)
    total = 0.0
    for token in tokenizer(option, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_log_likelihoods_are_the_sums_over_the_options_tokens(model, tokenizer, batch_tokens):
    got = log_likelihoods(model, tokenizer, ITEMS, batch_tokens=batch_tokens)
    for item, scores in zip(ITEMS, got, strict=True):
        expected = [log_likelihood_by_hand(model, tokenizer, item, option) for option in item.options]
        torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-4)


def test_the_scope_answer_edits_the_last_prompt_token_and_the_option(model, tokenizer):
    """Against a plain hook that edits just these tokens of each text alone."""
    vector = plain_vector(model)
    with repe.steer(model, vector, 3.0, scope="answer") as handle:
        got = log_likelihoods(model, tokenizer, ITEMS)
        assert handle.prompt_length is None
    for item, scores in zip(ITEMS, got, strict=True):
        first = len(encode(tokenizer, item.prompt)) - 1

        def edit(module, args, output, first=first):
            changed = output.clone()
            changed[:, first:] += 3 * vector.displacement[1]
            return changed

        hook = model.model.layers[1].register_forward_hook(edit)
        expected = [log_likelihood_by_hand(model, tokenizer, item, option) for option in item.options]
        hook.remove()
        torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-4)


def test_a_failed_measurement_gives_handles_their_prompt_length_back(model, tokenizer):
    with repe.steer(model, plain_vector(model), 1.0) as handle:
        handle.prompt_length = 5
        bad = [Item("a", ("b", ""), 0)]
        with pytest.raises(ValueError, match="option '' has no tokens"):
            log_likelihoods(model, tokenizer, bad)
        assert handle.prompt_length == 5
        log_likelihoods(model, tokenizer, ITEMS)
        assert handle.prompt_length == 5


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_every_causal_model_is_scored_token_by_token(name, tokenizer):
    model = zoo.build(name)
    for item, scores in zip(ITEMS[:2], log_likelihoods(model, tokenizer, ITEMS[:2]), strict=True):
        expected = [log_likelihood_by_hand(model, tokenizer, item, option) for option in item.options]
        torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [*zoo.ENCODERS, *zoo.ENCODER_DECODERS])
def test_models_that_see_the_option_are_refused(name, tokenizer):
    with pytest.raises(ValueError, match=r"is an encoder-decoder|is not causal") as raised:
        log_likelihoods(zoo.build(name), tokenizer, ITEMS)
    assert "need a causal language model" in str(raised.value)


def test_models_are_judged_by_what_they_are_and_not_by_their_family():
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    check_causal(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)))
    with pytest.raises(ValueError, match="the attention of BertModel is not causal"):
        check_causal(BertModel(BertConfig(**sizes)))
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        check_causal(LlamaModel(zoo.build("llama").config))


def test_offloaded_models_are_scored_as_they_are(model, tokenizer):
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    got, expected = (log_likelihoods(m, tokenizer, ITEMS) for m in (offloaded, model))
    torch.testing.assert_close(torch.cat(got), torch.cat(expected))


def test_the_head_runs_only_where_an_option_is_predicted(model, tokenizer):
    model, seen = copy.deepcopy(model), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    item = Item("a long prompt of many tokens", ("b", "cde"))
    log_likelihoods(model, tokenizer, [item])
    assert seen == [3]  # the last of the prompt, and two of the longer option, whose last predicts nothing


# answers


def test_the_greedy_answer_is_what_the_model_would_write(model, tokenizer):
    """The one that is written, one that differs in the last token, and one that goes on."""
    prompt, vector = tokenizer("ab")["input_ids"], oracles.vector(recommended=(2,))
    model_of = {name: zoo.build(name) for name in ("llama", "bloom")}
    for name in model_of:
        scorer = TransformersScorer(model_of[name], tokenizer)
        with repe.steer(model_of[name], vector, 0.7):
            row = torch.tensor([prompt])
            written = model_of[name].generate(row, do_sample=False, max_new_tokens=3, eos_token_id=None)[0].tolist()
        others = [[*written[:-1], written[-1] + 1], [*written, 5], written[:-1]]
        answers = [Answer(tuple(ids), len(prompt)) for ids in (written, *others)]
        found = scorer.log_likelihoods(answers, Edit.of(vector), [0.7, -3.0])
        for row, alpha in enumerate((0.7, -3.0)):
            with repe.steer(model_of[name], vector, alpha):
                expected = [oracles.log_p(model_of[name], prompt, answer.ids[len(prompt) :])[1] for answer in answers]
            assert found.greedy[row].tolist() == expected
            assert alpha < 0 or expected == [True, False, expected[2], True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_several_that_are_likeliest_the_first_is_written(dtype):
    logits = torch.tensor([[[1.0, 3.0, 2.0]], [[3.0, 1.0, 3.0]]], dtype=dtype)  # two nodes at one strength
    node, tokens = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 0, 2])
    found = scoring._are_greedy(logits, node, tokens)[:, 0].tolist()
    assert found[:3] == [True, False, True]
    if dtype == torch.bfloat16:  # elsewhere likelihoods are never the same by rounding
        assert not found[3]


def test_without_an_edit_it_is_the_model_as_it_is_at_every_strength(model, tokenizer):
    vector = oracles.vector()
    answers, scorer = [Answer((1, 9, 8, 20, 21), 3), Answer((1, 9, 30), 2)], TransformersScorer(model, tokenizer)
    for alpha in (0.0, 2.0):
        with repe.steer(model, vector, alpha):
            found = scorer.log_likelihoods(answers, None, [-1.0, 5.0]).log_p
            expected = [oracles.log_p(model, a.ids[: a.begins], a.ids[a.begins :])[0] for a in answers]
        torch.testing.assert_close(found, torch.tensor([expected] * 2), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("ids", "begins"), [((1, 2), 0), ((1, 2), 3), ((), 0)])
def test_an_answer_stands_behind_a_token_at_least(ids, begins):
    with pytest.raises(ValueError, match=f"begins behind at least one of its {len(ids)} tokens, not at {begins}"):
        Answer(ids, begins)


def test_an_answer_of_no_tokens_has_no_probability(model, tokenizer):
    with pytest.raises(ValueError, match="an answer of no tokens has no probability"):
        TransformersScorer(model, tokenizer).log_likelihoods([Answer((1, 2), 2)], None, [0.0])


# probabilities


def test_log_probabilities_are_taken_in_float32_or_better():
    logits = torch.randn(3, 50) * 9
    for dtype, computed in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        found = log_probabilities(logits.to(dtype))
        assert found.dtype == computed
        torch.testing.assert_close(found, logits.to(dtype).double().log_softmax(-1).to(computed), atol=1e-4, rtol=1e-5)
    tokens = torch.tensor([4, 0, 49])
    assert torch.equal(log_probability(logits, tokens), log_probabilities(logits)[range(3), tokens])


def test_the_divergence_is_that_of_the_textbook_and_0_log_0_is_0():
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]).double(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double()
    assert float(divergence(p.log(), q.log())) == pytest.approx(0.5 * np.log(2))
    assert float(divergence(q.log(), p.log())) == np.inf
    assert float(divergence(q.log(), q.log())) == 0
    assert divergence(q.log() * torch.nan, q.log()).isnan()
