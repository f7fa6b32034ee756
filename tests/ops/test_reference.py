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


def gradients_of(x: Tensor, strength: Tensor, of: Coefficients, weights: Tensor) -> list[Tensor]:
    """Of the weighted sum of what is edited, with respect to the activations, the strength and all constants."""
    leaves = [t.clone().requires_grad_() for t in (x, strength, *of.tensors)]
    learned = Coefficients(*leaves[2:], gain=of.gain, keep_norm=of.keep_norm, needs_projection=of.needs_projection)
    edit(leaves[0], leaves[1], learned).backward(weights)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


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
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    plain = edit(leaves[0], strengths(ROWS, 1), of)
    with torch.autocast("cpu", torch.bfloat16):
        cast = edit(leaves[1], strengths(ROWS, 1), of)
    assert torch.equal(cast, plain)
    for edited in (plain, cast):
        edited.backward(x)
    assert torch.equal(leaves[0].grad, leaves[1].grad)


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


@every_dtype
@every_gain
@pytest.mark.parametrize("keep_norm", [False, True])
def test_knowing_that_every_strength_counts_changes_nothing(dtype, gain, keep_norm):
    x, of, strength = activations(dtype=dtype), constants(gain=gain, keep_norm=keep_norm), strengths(ROWS, TOKENS)
    assert torch.equal(edit(x, strength, of, everywhere=True), edit(x, strength, of))


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
@pytest.mark.parametrize("needs_projection", [False, True])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_the_gradient_of_what_is_left_alone_is_one_and_does_not_spread(gain, keep_norm, needs_projection, poison):
    of = constants(3, gain, "both", keep_norm, needs_projection=needs_projection)
    strength, clean, weights = torch.ones(ROWS, TOKENS), activations(), activations(seed=5)
    strength[0, 1], strength[2, 2] = 0, 0
    poisoned = clean.clone()
    poisoned[0, 1], poisoned[2, 2], weights[2, 2] = poison, poison, poison
    of_x, *expected = gradients_of(clean, strength, of, weights)
    got_x, *got = gradients_of(poisoned, strength, of, weights)
    left_alone = strength == 0
    assert torch.equal(got_x[~left_alone], of_x[~left_alone])
    torch.testing.assert_close(got_x[left_alone], weights[left_alone], rtol=0, atol=0, equal_nan=True)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_zero_token_has_a_finite_gradient(keep_norm):
    x = torch.zeros(1, 1, D, requires_grad=True)
    edit(x, torch.ones(1, 1), constants(gain="norm", keep_norm=keep_norm)).sum().backward()
    assert x.grad.isfinite().all()


@every_gain
def test_the_gradient_where_nothing_is_left_is_finite(gain):
    basis, free = torch.eye(D)[:1], torch.tensor([math.inf])
    of = Coefficients(basis, basis, -torch.ones(1), torch.zeros(1), -free, free, gain=gain, keep_norm=True)
    x = torch.cat([5 * basis, 0 * basis, torch.ones(1, D)])[None]
    assert all(grad.isfinite().all() for grad in gradients_of(x, torch.ones(1, 1), of, torch.ones_like(x)))


def test_what_is_trained_is_followed():
    one = torch.ones(1)
    direction = torch.nn.functional.one_hot(torch.tensor([2]), 4).float()
    of = Coefficients(direction, direction, 0 * one, one.clone(), -9 * one, 9 * one, needs_projection=False)
    assert of.is_constant
    of.offset.requires_grad_()
    assert not of.is_constant
    edit(torch.zeros(1, 1, 4), torch.ones(1, 1), of).sum().backward()
    assert of.offset.grad == 1


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


def test_auto_passes_on_what_it_is_told(monkeypatch):
    given = activations(), strengths(1, 1), constants()
    monkeypatch.setattr(ops, "edit", lambda *args, **options: (args, options))
    assert ops.auto(*given, everywhere=True) == (given, {"everywhere": True})


def test_nothing_is_probed_while_a_transform_looks_on():
    x, seen = torch.ones(2, 3, 4), []

    def looked_at(x: Tensor) -> Tensor:
        seen.append(ops.may_be_probed())
        return x.sum()

    torch.func.vmap(looked_at)(x)
    torch.func.grad(looked_at)(x)
    with torch.autograd.forward_ad.dual_level():
        looked_at(x)
    assert seen == [False] * 3
    assert ops.may_be_probed()


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
    ops._working_kernels.cache_clear()


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


def test_a_stream_of_eight_bits_is_refused_with_what_to_do():
    x = torch.zeros(1, 1, 4).to(torch.float8_e4m3fn)
    one, direction = torch.ones(1), torch.ones(1, 4)
    with pytest.raises(TypeError, match=r"float8_e4m3fn cannot be edited: run the model in one of .*bfloat16"):
        edit(x, torch.ones(1, 1), ops.Coefficients(direction, direction, one, one, one, one))
