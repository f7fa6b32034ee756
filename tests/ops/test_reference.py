"""The edit formula against itself in float64, token by token."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from repe import ops
from repe.ops import Coefficients, edit
from repe.ops.gradients import gradients

ROWS, TOKENS, D = 3, 5, 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GAINS = ["one", "sign", "norm"]
CLIPS = {"free": (-math.inf, math.inf), "both": (-0.5, 0.7), "cap": (-math.inf, 0.0), "floor": (0.0, math.inf)}
STRENGTHS = [(1, 1), (ROWS, 1), (1, TOKENS), (ROWS, TOKENS)]

every_gain = pytest.mark.parametrize("gain", GAINS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def constants(k=2, gain="one", clip="free", keep_norm=False, slope=None, seed=0, **more) -> Coefficients:
    generator = torch.Generator().manual_seed(seed)
    read, write = torch.randn(2, k, D, generator=generator) / D**0.5
    slopes, offset = torch.randn(2, k, generator=generator)
    low, high = (torch.full((k,), bound) for bound in CLIPS[clip])
    slopes = slopes if slope is None else torch.full((k,), float(slope))
    return Coefficients(read, write, slopes, offset, low, high, gain=gain, keep_norm=keep_norm, **more)


def activations(rows=ROWS, tokens=TOKENS, dtype=torch.float32, seed=1) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strengths(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def by_hand(x: Tensor, strength: Tensor, of: Coefficients) -> np.ndarray:
    """The formula as it is written down, one token and one direction at a time, in float64."""
    read, write, slope, offset, low, high = (t.double().numpy() for t in of.tensors)
    tokens = x.detach().double().numpy()
    amounts = np.broadcast_to(strength.double().numpy(), tokens.shape[:2])
    edited = tokens.copy()
    for i, j in itertools.product(*map(range, tokens.shape[:2])):
        token, amount = tokens[i, j], amounts[i, j]
        if amount == 0:
            continue
        p = [float(r @ token) for r in read]
        gain = {"one": [1.0] * len(p), "sign": np.sign(p), "norm": [math.sqrt(sum(v * v for v in p))] * len(p)}[of.gain]
        for k in range(len(p)):
            c = min(max(slope[k] * p[k] + offset[k] * gain[k], low[k]), high[k])
            edited[i, j] += amount * c * write[k]
        if of.keep_norm and (after := np.linalg.norm(edited[i, j])) > 0:
            edited[i, j] *= np.linalg.norm(token) / after
    return edited


# the formula


@every_gain
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_it_is_the_formula(gain, clip, k, keep_norm):
    of = constants(k, gain, clip, keep_norm)
    for shape in STRENGTHS:
        x, strength = activations(), strengths(*shape)
        np.testing.assert_allclose(edit(x, strength, of).numpy(), by_hand(x, strength, of), atol=3e-6)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_without_a_projection_it_is_the_same_formula(keep_norm):
    of = constants(keep_norm=keep_norm, slope=0.0)
    for shape in STRENGTHS:
        x, strength = activations(), strengths(*shape)
        short = edit(x, strength, replace(of, needs_projection=False))
        np.testing.assert_allclose(short.numpy(), by_hand(x, strength, of), atol=3e-6)


def test_without_a_projection_coefficients_are_clipped_too():
    of = constants(clip="both", slope=0.0, needs_projection=False)
    assert (of.offset.abs() > 0.7).any()
    np.testing.assert_allclose(
        edit(activations(), torch.ones(1, 1), of).numpy(), by_hand(activations(), torch.ones(1, 1), of), atol=3e-6
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 1), (0, 3), (3, 0)])
def test_any_number_of_rows_and_tokens(shape):
    x, of = activations(*shape), constants(gain="norm", keep_norm=True)
    np.testing.assert_allclose(edit(x, strengths(1, 1), of).numpy(), by_hand(x, strengths(1, 1), of), atol=3e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x[::2],
        lambda x: x[:, 1::2],
        lambda x: x.flip(1),
        lambda x: x[:1].expand(3, -1, -1),
    ],
    ids=["transposed", "rows", "tokens", "flipped", "expanded"],
)
def test_memory_in_any_order(view):
    x, of = view(activations()), constants(gain="norm", keep_norm=True)
    before = x.clone()
    edited = edit(x, torch.full((1, 1), 0.7), of)
    torch.testing.assert_close(edited, edit(before.contiguous(), torch.full((1, 1), 0.7), of))
    assert torch.equal(x, before)


# precision


@every_dtype
@every_gain
@pytest.mark.parametrize("keep_norm", [False, True])
def test_the_dtype_stays_and_the_error_is_that_of_one_rounding(dtype, gain, keep_norm):
    x, of = activations(dtype=dtype), constants(gain=gain, keep_norm=keep_norm)
    edited = edit(x, strengths(ROWS, 1), of)
    assert edited.dtype == dtype
    exact = by_hand(x, strengths(ROWS, 1), of)
    arithmetic = 1e-12 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(edited.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=arithmetic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_errs_less_than_the_formula_in_the_streams_dtype(dtype):
    of, one = constants(k=3, slope=-1.0), torch.ones(1, 1)
    x = 30 * activations(8, 32, dtype=dtype)
    read, write, slope, offset = (t.to(dtype) for t in of.tensors[:4])
    naive = x + (slope * (x @ read.T) + offset) @ write
    exact = torch.from_numpy(by_hand(x, one, of))
    assert (edit(x, one, of).double() - exact).norm() < 0.9 * (naive.double() - exact).norm()


@every_dtype
def test_autocast_changes_nothing(dtype):
    x, of = activations(dtype=dtype), constants(k=3, gain="norm", keep_norm=True)
    plain = edit(x, strengths(ROWS, 1), of)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edit(x, strengths(ROWS, 1), of), plain)


# what is not named is not touched


@every_dtype
@every_gain
@pytest.mark.parametrize("keep_norm", [False, True])
def test_strength_zero_is_the_identity_bit_by_bit(dtype, gain, keep_norm):
    x = activations(dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = math.inf, math.nan, -0.0
    edited = edit(x, torch.zeros(1, 1), constants(gain=gain, keep_norm=keep_norm))
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(edited.view(as_bits), x.view(as_bits))


@every_gain
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_tokens_do_not_influence_each_other(gain, poison):
    of, on = constants(gain=gain, keep_norm=True), torch.ones(ROWS, TOKENS)
    clean = edit(activations(), on, of)
    x, strength = activations(), on.clone()
    x[1, 2], strength[0, 1] = poison, 0
    edited = edit(x, strength, of)
    untouched = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    untouched[1, 2] = untouched[0, 1] = False
    torch.testing.assert_close(edited[untouched], clean[untouched])
    assert torch.equal(edited[0, 1], x[0, 1])


def test_every_row_has_its_own_strength():
    of, x, strength = constants(), activations(), torch.tensor([[0.0], [1.0], [-2.0]])
    together = edit(x, strength, of)
    for row in range(ROWS):
        torch.testing.assert_close(together[row : row + 1], edit(x[row : row + 1], strength[row : row + 1], of))
    assert torch.equal(together[0], x[0])


# norms


@every_gain
@pytest.mark.parametrize("amount", [-3.0, 0.5, 100.0])
def test_keep_norm_keeps_the_norm(gain, amount):
    x = activations()
    edited = edit(x, torch.full((1, 1), amount), constants(gain=gain, keep_norm=True))
    torch.testing.assert_close(edited.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(edited, x, atol=1e-2)


def test_keep_norm_leaves_zero_rows_zero():
    x = activations()
    x[1, 1] = 0
    assert (edit(x, torch.ones(1, 1), constants(keep_norm=True))[1, 1] == 0).all()


def test_keep_norm_where_nothing_is_left_gives_zeros():
    basis = torch.eye(D)[:1]
    free = torch.tensor([math.inf])
    of = Coefficients(basis, basis, torch.tensor([-1.0]), torch.zeros(1), -free, free, keep_norm=True)
    assert (edit(5 * basis[None], torch.ones(1, 1), of) == 0).all()


# gradients


@every_gain
@pytest.mark.parametrize("keep_norm", [False, True])
def test_it_is_differentiable(gain, keep_norm):
    of = constants(gain=gain, keep_norm=keep_norm, clip="both")
    wide = Coefficients(*(t.double() for t in of.tensors), gain=gain, keep_norm=keep_norm)
    x = activations(2, 3, torch.float64).requires_grad_()
    strength = strengths(2, 3).double()
    strength[0, 1] = 0
    assert torch.autograd.gradcheck(lambda x: edit(x, strength, wide), x)


def test_the_constants_and_the_strength_can_be_learned():
    of = constants()
    tensors = [t.double().requires_grad_() for t in of.tensors[:4]]
    x, bounds = activations(2, 3, torch.float64), [t.double() for t in of.tensors[4:]]
    strength = strengths(2, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, *learned: edit(x, s, Coefficients(*learned, *bounds)), (strength, *tensors)
    )


@every_gain
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_the_gradient_of_what_is_left_alone_is_one_and_does_not_spread(gain, keep_norm, poison):
    of, strength = constants(gain=gain, keep_norm=keep_norm), torch.ones(ROWS, TOKENS)
    strength[0, 1], strength[1, 0] = 0, 0
    weights = activations(seed=5)

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (edit(x, strength, of) * weights)[strength != 0].sum().backward()
        return x.grad

    poisoned = activations()
    poisoned[0, 1] = poison
    on = strength != 0
    torch.testing.assert_close(gradient(poisoned)[on], gradient(activations())[on])
    assert gradient(poisoned)[on].isfinite().all()
    assert (gradient(poisoned)[~on] == 0).all()


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_zero_token_has_a_finite_gradient(keep_norm):
    x = torch.zeros(1, 1, D, requires_grad=True)
    edit(x, torch.ones(1, 1), constants(gain="norm", keep_norm=keep_norm)).sum().backward()
    assert x.grad.isfinite().all()


# the constants


def test_copy_takes_the_values_in_place():
    mine, theirs = constants(seed=3), constants(seed=4, clip="both")
    places = [t.data_ptr() for t in mine.tensors]
    mine.copy_(theirs)
    assert [t.data_ptr() for t in mine.tensors] == places
    assert all(torch.equal(a, b) for a, b in zip(mine.tensors, theirs.tensors, strict=True))
    x, strength = activations(), strengths(1, 1)
    assert torch.equal(edit(x, strength, mine), edit(x, strength, theirs))


def test_to_moves_every_tensor_and_keeps_the_rest():
    of = constants(gain="sign", keep_norm=True, needs_projection=False)
    moved = of.to("meta")
    assert moved.device.type == "meta"
    assert {t.device.type for t in moved.tensors} == {"meta"}
    assert (moved.gain, moved.keep_norm, moved.needs_projection) == ("sign", True, False)
    assert of.device.type == "cpu"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"read": torch.zeros(D)}, r"both \(K, d_model\); got the shapes \(24,\) and \(2, 24\)"),
        ({"write": torch.zeros(1, D)}, r"got the shapes \(2, 24\) and \(1, 24\)"),
        ({"offset": torch.zeros(2, 1)}, r"`offset` is one number a direction, \(2,\); got the shape \(2, 1\)"),
        ({"high": torch.zeros(())}, r"`high` is one number a direction"),
        ({"gain": "none"}, r"gain='none' is not known: use one of \['one', 'sign', 'norm'\]"),
    ],
)
def test_constants_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(constants(), **wrong)


# writing in place


@every_dtype
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT.contiguous().mT], ids=["plain", "transposed"])
def test_the_result_can_be_written_anywhere(dtype, view):
    x, of = view(activations(dtype=dtype)), constants(gain="norm", keep_norm=True)
    expected, out = edit(x, strengths(ROWS, 1), of), torch.full_like(x, math.nan)
    assert edit(x, strengths(ROWS, 1), of, out=out) is out
    assert torch.equal(out, expected)
    assert edit(x, strengths(ROWS, 1), of, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            activations(ROWS, 1),
            r"`out` must be as x is, torch.float32 \(3, 5, 24\) on cpu; got torch.float32 \(3, 1, 24\)",
        ),
        (activations(dtype=torch.float16), r"got torch.float16 \(3, 5, 24\) on cpu"),
        (activations().to("meta"), r"got torch.float32 \(3, 5, 24\) on meta"),
        (activations(1).expand(ROWS, -1, -1), "`out` is expanded, so that several activations lie in one place"),
    ],
)
def test_memory_that_cannot_take_the_result_is_refused(out, message):
    with pytest.raises(ValueError, match=message):
        edit(activations(), strengths(1, 1), constants(), out=out)


def test_what_has_a_gradient_is_not_written_in_place():
    x, learned = activations().requires_grad_(), replace(constants(), write=constants().write.requires_grad_())
    for args in [(x, strengths(1, 1), constants()), (x.detach(), strengths(1, 1), learned)]:
        with pytest.raises(ValueError, match=r"has no gradient: leave it out, or use torch.no_grad\(\)"):
            edit(*args, out=activations())
        with torch.no_grad():
            assert torch.equal(edit(*args, out=activations()), edit(*args))


# stochastic rounding


def drawn(values: Tensor, seed: int) -> Tensor:
    """`values`, (d_model,), as one edit of a token of zeros writes them."""
    one = torch.ones(1)
    of = Coefficients(values[None], values[None], 0 * one, one, one, one, needs_projection=False)
    zeros = torch.zeros(1, 1, len(values), dtype=torch.bfloat16)
    return edit(zeros, one[None], of, rounding="stochastic", seed=torch.tensor(seed))[0, 0]


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -3.0, 2.0**-100])
def test_stochastic_rounding_has_the_mean_and_the_variance_it_should(share, low):
    spacing = abs(low) * 2.0**-7 if low != -3.0 else 2.0**-6
    rounded = drawn(torch.full((40_000,), low + share * spacing), seed=1).double()
    ups = (rounded - low) / spacing
    assert set(ups.tolist()) == {0, 1}
    assert abs(ups.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(ups))
    assert ups.var() == pytest.approx(share * (1 - share), abs=0.02 * share**0.5)


def test_stochastic_rounding_draws_every_place_and_token_anew():
    between = 1 + 2.0**-8
    of = Coefficients(torch.ones(1, 400), torch.ones(1, 400), *(between * torch.tensor([[0.0], [1], [1], [1]])))
    x = torch.zeros(4, 50, 400, dtype=torch.bfloat16)
    ups = (edit(x, torch.ones(1, 1), of, rounding="stochastic", seed=torch.tensor(3)).double() - 1) * 128
    for places in (ups.flatten(0, 1), ups.flatten(0, 1).T):
        centred = places - places.mean(-1, keepdim=True)
        correlations = torch.corrcoef(centred).triu(1)
        assert correlations.abs().max() < 6 / math.sqrt(places.shape[1])
    assert ups.mean(-1).std() < 1.2 * 0.5 / math.sqrt(400)


def test_an_edit_below_the_resolution_survives_on_average():
    of = constants(1, slope=0.0, needs_projection=False)
    x, amount = torch.ones(50, 40, D, dtype=torch.bfloat16), torch.full((1, 1), 1e-3)
    shift = 1e-3 * of.offset * of.write[0]
    assert torch.equal(edit(x, amount, of), x)
    moved = edit(x, amount, of, rounding="stochastic", seed=torch.tensor(0)).double() - x.double()
    torch.testing.assert_close(moved.mean((0, 1)), shift.double(), atol=4 * 2**-8 * 0.25 / 2000**0.5, rtol=0)


def test_stochastic_rounding_leaves_alone_what_needs_none():
    values = torch.tensor([1.0, -3.5, 0.0, math.inf, -math.inf, 3.3895e38, 2.0**-130]).to(torch.bfloat16)
    for seed in range(4):
        assert torch.equal(drawn(values.float(), seed).view(torch.int16), values.view(torch.int16))
    all_ones = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert drawn(all_ones, 0).isnan().all()
    x = activations(dtype=torch.bfloat16)
    untouched = edit(x, torch.zeros(1, 1), constants(), rounding="stochastic", seed=torch.tensor(0))
    assert torch.equal(untouched, x)


def test_a_seed_draws_alike_and_another_differently():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    same, other = drawn(values, 7), [drawn(values, seed) for seed in (8, -7, 7 + 2**32, -(2**63))]
    assert torch.equal(same, drawn(values, 7))
    assert not any(torch.equal(same, each) for each in other)


def test_gradients_pass_through_stochastic_rounding_as_through_a_cast():
    x, of = activations(dtype=torch.bfloat16), constants(gain="norm", keep_norm=True)
    grads = []
    for how in ({}, {"rounding": "stochastic", "seed": torch.tensor(0)}):
        leaf = x.clone().requires_grad_()
        (edit(leaf, strengths(ROWS, 1), of, **how) * x).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


SEED = torch.tensor(0)


@pytest.mark.parametrize(
    ("dtype", "how", "error", "message"),
    [
        (torch.bfloat16, {"rounding": "up"}, ValueError, r"rounding='up' is not known: use one of \['nearest', 'stoch"),
        (torch.bfloat16, {"seed": SEED}, ValueError, "rounding='nearest' takes no seed: leave it out, or pass"),
        (
            torch.float16,
            {"rounding": "stochastic", "seed": SEED},
            ValueError,
            "is for bfloat16 activations, got torch.f",
        ),
        (torch.bfloat16, {"rounding": "stochastic"}, TypeError, "needs a seed, one int64 on cpu, and got none"),
        (
            torch.bfloat16,
            {"rounding": "stochastic", "seed": SEED.int()},
            TypeError,
            r"got torch.int32 of shape \(\) on cpu",
        ),
        (torch.bfloat16, {"rounding": "stochastic", "seed": SEED.expand(2)}, TypeError, r"of shape \(2,\) on cpu"),
        (torch.bfloat16, {"rounding": "stochastic", "seed": SEED.to("meta")}, TypeError, r"of shape \(\) on meta"),
    ],
)
def test_rounding_that_cannot_be_meant_is_refused(dtype, how, error, message):
    with pytest.raises(error, match=message):
        edit(activations(dtype=dtype), strengths(1, 1), constants(), **how)


# the derivative that the fused edit uses


NAMES = ("x", "strength", "read", "write", "slope", "offset", "low", "high")


def by_autograd(x: Tensor, strength: Tensor, of: Coefficients, grad: Tensor) -> dict[str, Tensor | None]:
    leaves = [t.clone().requires_grad_() for t in (x, strength, *of.tensors)]
    given = replace(of, **dict(zip(NAMES[2:], leaves[2:], strict=True)))
    edit(leaves[0], leaves[1], given).backward(grad)
    return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


@every_gain
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("needs_projection", [False, True])
def test_the_derivative_is_that_of_autograd(gain, clip, keep_norm, needs_projection):
    of = constants(3, gain, clip, keep_norm, needs_projection=needs_projection)
    of = replace(of, **{name: t.double() for name, t in zip(NAMES[2:], of.tensors, strict=True)})
    x, grad = activations(dtype=torch.float64), activations(dtype=torch.float64, seed=7)
    x[1, 3] = 0
    for shape in STRENGTHS:
        strength = strengths(*shape).double()
        strength[0, 0] = 0
        mine = gradients(grad, x, strength, of)
        for name, expected in by_autograd(x, strength, of, grad).items():
            got = getattr(mine, name)
            assert (got is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_derivative_where_nothing_is_left_is_finite():
    basis, free = torch.eye(D)[:1], torch.tensor([math.inf])
    of = Coefficients(basis, basis, -torch.ones(1), torch.zeros(1), -free, free, gain="norm", keep_norm=True)
    x = torch.cat([5 * basis, 0 * basis, torch.ones(1, D)])[None]
    mine, expected = (
        gradients(torch.ones_like(x), x, torch.ones(1, 1), of),
        by_autograd(x, torch.ones(1, 1), of, torch.ones_like(x)),
    )
    for name in ("x", "strength", "read", "write", "slope", "offset"):
        torch.testing.assert_close(getattr(mine, name), expected[name])


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_the_derivative_of_what_is_left_alone_is_one_and_does_not_spread(poison):
    of, strength, grad = constants(gain="norm", keep_norm=True), torch.ones(ROWS, TOKENS), activations(seed=7)
    strength[0, 1], strength[2, 2] = 0, 0
    clean, x = activations(), activations()
    x[0, 1], x[2, 2], grad[2, 2] = poison, poison, poison
    mine, expected = gradients(grad, x, strength, of), gradients(grad, clean, strength, of)
    torch.testing.assert_close(mine.x, torch.where((strength == 0)[..., None], grad, expected.x), equal_nan=True)
    for name in NAMES[1:]:
        torch.testing.assert_close(getattr(mine, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_derivative_has_the_streams_dtype_and_ignores_autocast(dtype):
    x, grad, of = activations(dtype=dtype), activations(dtype=dtype, seed=7), constants()
    plain = gradients(grad, x, strengths(1, 1), of)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(grad, x, strengths(1, 1), of)
    assert plain.x.dtype == dtype
    assert torch.equal(plain.x, cast.x)
    assert torch.equal(plain.read, cast.read)


# which implementation


def test_implementations_are_picked_by_name():
    assert ops.pick("auto") is ops.auto
    assert ops.pick("reference") is edit
    with pytest.raises(
        ValueError, match=r"impl='cuda' is not an implementation .*: use one of \['auto', 'reference', 'tr"
    ):
        ops.pick("cuda")


@every_dtype
def test_auto_on_a_cpu_is_the_reference(dtype):
    x, of = activations(dtype=dtype), constants(gain="norm", keep_norm=True)
    assert torch.equal(ops.auto(x, strengths(ROWS, 1), of), edit(x, strengths(ROWS, 1), of))
    assert ops.auto(x, strengths(ROWS, 1), of, out=x) is x


def test_auto_passes_on_what_it_is_told():
    x, of, how = activations(dtype=torch.bfloat16), constants(), {"rounding": "stochastic", "seed": torch.tensor(4)}
    assert torch.equal(ops.auto(x, strengths(1, 1), of, **how), edit(x, strengths(1, 1), of, **how))


def test_auto_imports_triton_only_for_a_gpu():
    code = """
import sys, torch
from repe import ops
import repe.steering.handle
one, ones = torch.ones(1, 1, 1), torch.ones(1)
ops.pick("auto")(one, one[0], ops.Coefficients(one[0], one[0], ones, ones, ones, ones))
print("triton" in sys.modules, "repe.ops.kernel" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture
def _forgotten():
    """What was found out about kernels so far."""
    yield
    for cached in (ops._working_kernels, ops._say_once):
        cached.cache_clear()


@pytest.fixture
def _no_triton(monkeypatch, _forgotten):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "repe.ops.kernel", raising=False)
    monkeypatch.delattr(ops, "kernel", raising=False)


@pytest.mark.usefixtures("_no_triton")
def test_without_triton_the_kernel_cannot_be_asked_for():
    with pytest.raises(
        ImportError, match=r"Triton cannot be imported \(ModuleNotFoundError: .*\): install triton, or use"
    ):
        ops.pick("triton")


@pytest.mark.usefixtures("_no_triton")
def test_without_triton_auto_is_the_reference_and_says_why_once(monkeypatch):
    monkeypatch.setattr(ops, "WITH_KERNELS", ("cpu",))
    x, of = activations(), constants()
    with pytest.warns(
        RuntimeWarning, match="does not run on cpu, and plain PyTorch is used instead: .*cannot be imported"
    ):
        edited = ops.auto(x, strengths(ROWS, 1), of)
    assert torch.equal(edited, edit(x, strengths(ROWS, 1), of))
    assert torch.equal(ops.auto(x, strengths(ROWS, 1), of), edited)


@pytest.mark.usefixtures("_forgotten")
def test_where_triton_is_broken_auto_is_the_reference_and_says_why_once(monkeypatch):
    def probe(device):
        raise RuntimeError("no compiler found")

    broken = SimpleNamespace(probe=probe)
    monkeypatch.setattr(ops, "_kernels", lambda: broken)
    monkeypatch.setattr(ops, "WITH_KERNELS", ("cpu",))
    x, of = activations(), constants()
    with pytest.warns(
        RuntimeWarning, match="does not run on cpu, and plain PyTorch is used instead: no compiler found"
    ):
        edited = ops.auto(x, strengths(ROWS, 1), of)
    assert torch.equal(edited, edit(x, strengths(ROWS, 1), of))
    assert torch.equal(ops.auto(x, strengths(ROWS, 1), of), edited)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter edits on CPUs, too")
def test_the_kernel_on_a_cpu_says_why_it_cannot_run():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="the kernel runs on GPUs, and the activations are on cpu; use impl='auto' or"):
        ops.pick("triton")(activations(), strengths(1, 1), constants())


def test_what_is_trained_later_is_not_what_was_worked_out_before():
    one = torch.ones(1)
    direction = torch.nn.functional.one_hot(torch.tensor([2]), 4).float()
    constants = ops.Coefficients(direction, direction, 0 * one, one.clone(), -9 * one, 9 * one, needs_projection=False)
    constants.offset.requires_grad_()
    edit(torch.zeros(1, 1, 4), torch.ones(1, 1), constants).sum().backward()
    assert constants.offset.grad == 1


def test_a_stream_of_eight_bits_is_refused_with_what_to_do():
    x = torch.zeros(1, 1, 4).to(torch.float8_e4m3fn)
    one, direction = torch.ones(1), torch.ones(1, 4)
    with pytest.raises(TypeError, match=r"float8_e4m3fn cannot be edited: run the model in one of .*bfloat16"):
        edit(x, torch.ones(1, 1), ops.Coefficients(direction, direction, one, one, one, one))
