"""The edit formula against itself in float64, token by token."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repe import ops
from repe.ops import Coefficients, edit

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


def test_implementations_are_picked_by_name():
    assert ops.pick("auto") is ops.pick("reference") is edit
    with pytest.raises(ValueError, match="impl='cuda' is not an implementation of the edit formula: use one of"):
        ops.pick("cuda")
