"""Tasks: probabilities are those of the model, item by item and token by token."""

import copy
import json

import accelerate
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, LlamaModel

import repe
from repe.data.items import Item, load_items
from repe.measuring.scoring import check_causal, log_likelihoods
from repe.models.tokens import encode
from tests import zoo
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


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        json.dumps({"text": "a", "options": ["b"], "answer": 0}),
        json.dumps({"text": "a", "options": ["b", "c"], "answer": 2}),
        json.dumps({"text": "a", "aligned": "b"}),
        json.dumps({"aligned": "b", "misaligned": "c"}),
        json.dumps({"text": "a", "aligned": "b", "misaligned": "b"}),
    ],
)
def test_a_file_with_a_bad_line_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"text": "a", "aligned": "b", "misaligned": "c"}) + "\n" + line)
    with pytest.raises(ValueError, match=r"items.jsonl, line 2"):
        load_items(path)


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


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    path, text = tmp_path / "items.jsonl", "one\u2028two\u0085three\x1cfour"
    line = json.dumps({"text": text, "aligned": "b", "misaligned": "c"}, ensure_ascii=False)
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [item.prompt for item in load_items(path)] == [text, text]
