"""Costs: on plain texts, against a slow loop in float64."""

import numpy as np
import pytest
import torch

import repe
from repe.measuring.costs import costs
from repe.models.tokens import encode
from repe.steering import steer
from tests import oracles, zoo

TEXTS = ["a text of some length", "short", "another text, with the same b", "a text of some kind"]
ALPHAS = [-2.0, 0.0, 0.5, 3.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom"])
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_costs_are_those_of_a_slow_loop(name, scope, tokenizer):
    """KL(unsteered || steered), cross-entropy and change of the last block's output, text by text in float64."""
    model, vector = zoo.build(name), oracles.vector(3)
    found = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope=scope, batch_tokens=64)
    last = repe.models.blocks.find_stack(model).blocks[-1]
    every = []
    for column, text in enumerate(TEXTS):
        ids = torch.tensor([encode(tokenizer, text)])
        plain, hidden = run(model, last, ids)
        for row, alpha in enumerate(ALPHAS):
            with steer(model, vector, alpha, scope=scope) as handle:
                if scope == "generated":
                    handle.scope = torch.arange(ids.shape[1])[None] >= 1
                steered, moved = run(model, last, ids)
            kl = (plain.exp() * (plain - steered)).sum(-1)[:-1]
            every.append((row, kl))
            entropy = -steered[:-1].gather(-1, ids[0, 1:, None])
            assert found.kl[row, column] == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-6)
            assert found.cross_entropy[row, column] == pytest.approx(entropy.mean().item(), rel=1e-4)
            change = (moved - hidden)[:-1].norm(dim=-1).mean().item()
            assert found.change[row, column] == pytest.approx(change, rel=1e-3, abs=1e-4)
    for row in range(len(ALPHAS)):
        tokens = torch.cat([kl for of, kl in every if of == row]).numpy()
        assert found.kl_p95[row] == pytest.approx(max(0, np.quantile(tokens, 0.95)), rel=1e-3, abs=1e-6)
    assert found.kl[1].max() < 1e-9
    assert found.change[1].max() < 1e-4


def run(model, last, ids):
    with torch.no_grad():
        hidden = []
        hook = last.register_forward_hook(lambda module, args, output: hidden.append(output))
        logits = model(ids, use_cache=False).logits[0]
        hook.remove()
    output = hidden[0] if isinstance(hidden[0], torch.Tensor) else hidden[0][0]
    return logits.double().log_softmax(-1), output[0].double()


def test_costs_refuse_what_cannot_be_measured(tokenizer):
    model, vector = zoo.build("llama"), oracles.vector(3)
    with pytest.raises(ValueError, match="at least one text, each of two tokens or more"):
        costs(model, tokenizer, vector, [], [0.0, 1.0])
    with pytest.raises(ValueError, match="expected a list of texts, got 'a text'"):
        costs(model, tokenizer, vector, "a text", [0.0, 1.0])


def test_costs_at_a_strength_do_not_depend_on_the_others(tokenizer):
    model, vector = zoo.build("llama"), oracles.vector(3)
    together, alone = (costs(model, tokenizer, vector, TEXTS, alphas) for alphas in (ALPHAS, [3.0]))
    for name in ("kl", "kl_p95", "cross_entropy", "change"):
        np.testing.assert_allclose(getattr(alone, name)[0], getattr(together, name)[-1], rtol=1e-4)


def test_costs_in_trees_that_come_out_wrong_are_measured_in_rows(tokenizer, monkeypatch):
    monkeypatch.setattr("repe.measuring.fanout.obstacle", lambda module: "")
    model, vector = zoo.build("mpt"), oracles.vector(3)
    with pytest.warns(UserWarning, match="does not give texts in trees of shared prefixes what it gives them alone"):
        found = costs(model, tokenizer, vector, TEXTS, ALPHAS)
    monkeypatch.undo()
    assert found.kl == pytest.approx(costs(model, tokenizer, vector, TEXTS, ALPHAS).kl, rel=1e-3, abs=1e-5)


def test_costs_of_the_prompt_are_those_of_the_whole_text(tokenizer):
    model, vector = zoo.build("llama"), oracles.vector(3)
    whole = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope="all")
    prompt = costs(model, tokenizer, vector, TEXTS, ALPHAS, scope="prompt")
    np.testing.assert_allclose(prompt.kl, whole.kl, rtol=1e-3, atol=1e-6)
