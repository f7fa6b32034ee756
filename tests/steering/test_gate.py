"""What a gate reads of a prompt, and what it decides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repe.models.tokens import positions_at
from repe.steering.gate import Gate, PromptReader
from tests import oracles, zoo
from tests.layouts import layouts


def score(gate: Gate, x: Tensor) -> Tensor:
    v, row = gate.vector, gate.vector.row(gate.at)
    return (x.double() @ v.read[row].double() - v.midpoint[row].double()) / v.scale[row].double()


@pytest.mark.parametrize("token", ["last", "mean"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_opens_on_its_side_of_the_threshold(token, above, block, dtype):
    gate = Gate(oracles.vector(), threshold=-0.2, above=above, block=block, token=token)
    assert gate.at == (oracles.BLOCK if block is None else block)
    generator = torch.Generator().manual_seed(0)
    mean, last = (8 * torch.randn(2, 12, zoo.D_MODEL, generator=generator)).to(dtype)
    scores = score(gate, mean if token == "mean" else last)
    wanted = scores > -0.2 if above else scores < -0.2
    assert 0 < wanted.sum() < 12
    assert torch.equal(gate.decide(mean, last), wanted)


@given(layouts(), st.integers(1, 7))
def test_a_prompt_in_chunks_is_the_whole_prompt(layout, size):
    mask = torch.tensor(layout.mask)
    positions, valid = positions_at(torch.arange(mask.shape[1]), mask)
    is_last = (positions == mask.sum(1, keepdim=True) - 1) & valid
    hidden = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(0))
    poisoned = hidden.masked_fill(~valid[..., None], torch.nan)
    seen: list[tuple[Tensor, Tensor]] = []

    def decide(mean: Tensor, last: Tensor) -> Tensor:
        seen.append((mean, last))
        return mean[:, 0] > 0

    reader = PromptReader(decide)
    for start in range(0, mask.shape[1], size):
        chunk = slice(start, start + size)
        reader.see(poisoned[:, chunk], valid[:, chunk], is_last[:, chunk])
    for row in range(len(mask)):
        tokens = hidden[row, mask[row]]
        torch.testing.assert_close(seen[-1][0][row], tokens.mean(0))
        assert torch.equal(seen[-1][1][row], tokens[-1])
        assert reader.open[row] == (tokens.mean(0)[0] > 0) or tokens.mean(0)[0].abs() < 1e-6
    reader.restart()
    assert reader.open is None


def test_halves_are_summed_in_float32():
    seen = []
    reader = PromptReader(lambda mean, last: seen.append(mean) or torch.tensor([True]))
    on = torch.ones(1, 5000, dtype=torch.bool)
    reader.see(torch.full((1, 5000, 1), 100.0, dtype=torch.float16), on, on & False)
    assert seen[0].item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("decision", "got"),
    [
        (True, "True"),
        (torch.tensor([1.0, 0.0]), r"torch.float32 \(2,\)"),
        (torch.tensor([True]), r"torch.bool \(1,\)"),
        (torch.ones(2, 1, dtype=torch.bool), r"torch.bool \(2, 1\)"),
        ([True, False], r"\[True, False\]"),
    ],
)
def test_a_gate_returns_one_boolean_a_row(decision, got):
    on = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=rf"a gate must return a boolean tensor of shape \(2,\), one a row; got {got}"):
        PromptReader(lambda mean, last: decision).see(torch.zeros(2, 3, 4), on, on)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"threshold": float("nan")}, ValueError, "a gate's threshold must be finite, got nan"),
        ({"token": "first"}, ValueError, "reads the 'last' token or the 'mean' of the prompt, got token='first'"),
        ({"block": 9}, IndexError, "has no block 9"),
        ({"vector": oracles.vector(site="mlp")}, ValueError, "its vector is of the site 'mlp'"),
        (
            {"vector": oracles.vector() - oracles.vector()},
            ValueError,
            r"no distance between the poles at block 1 \(scale 0\)",
        ),
    ],
)
def test_gates_that_cannot_be_meant(options, kind, message):
    with pytest.raises(kind, match=message):
        Gate(**{"vector": oracles.vector(), **options})
