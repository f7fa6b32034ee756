"""The fused edit against the reference in float64.

On a machine without a GPU Triton interprets its kernels, which it has to know before it is imported: there, all tests
but the last run in a process of their own. To run some of them: `TRITON_INTERPRET=1 pytest tests/ops/test_kernel.py`.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import repe
from repe import ops
from repe.ops import Coefficients, reference
from repe.steering import kinds as edits
from tests import oracles, zoo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = DEVICE == "cuda" or INTERPRETED
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WORSE = 2  # times the reference's error, which sums in another order
GAINS = ["one", "sign", "norm"]
CLIPS = {"free": (-math.inf, math.inf), "both": (-0.5, 0.7), "cap": (-math.inf, 0.0), "floor": (0.0, math.inf)}
D = 24

# what NumPy says of infinities, and of lanes that hold no token, when Triton interprets
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_gain = pytest.mark.parametrize("gain", GAINS)
with_and_without_norms = pytest.mark.parametrize("keep_norm", [False, True])


def fused(x: Tensor, strength: Tensor, of: Coefficients, **options) -> Tensor:
    return ops.pick("triton")(x, strength, of, **options)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def constants(k=2, d_model=D, gain="one", clip="both", keep_norm=False, **more) -> Coefficients:
    read, write = random(2, k, d_model, seed=0) / d_model**0.5
    slope, offset = random(2, k, seed=1)
    low, high = (torch.full((k,), bound, device=DEVICE) for bound in CLIPS[clip])
    return Coefficients(read, write, slope, offset, low, high, gain=gain, keep_norm=keep_norm, **more)


def no_constants() -> Coefficients:
    return Coefficients(*(torch.zeros(0, D, device=DEVICE),) * 2, *(torch.zeros(0, device=DEVICE),) * 4)


def activations(rows=3, tokens=5, d_model=D, dtype=torch.float32) -> Tensor:
    return random(rows, tokens, d_model, seed=2).to(dtype)


def strengths(*shape: int) -> Tensor:
    return random(*shape, seed=3)


def widened(of: Coefficients) -> Coefficients:
    read, write, slope, offset, low, high = (t.double() for t in of.tensors)
    return replace(of, read=read, write=write, slope=slope, offset=offset, low=low, high=high)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def assert_errs_no_more(edited: Tensor, x: Tensor, strength: Tensor, of: Coefficients) -> None:
    """Than the reference in the stream's dtype, seen from float64."""
    exact = reference.edit(x.double(), strength.double(), widened(of))
    assert (edited.shape, edited.dtype, edited.device) == (x.shape, x.dtype, x.device)
    if x.numel():
        error, allowed = ((y.double() - exact).abs() for y in (edited, reference.edit(x, strength, of)))
        noise = 4 * torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps * exact.abs().max()
        assert error.max() <= WORSE * allowed.max() + noise
        assert error.mean() <= WORSE * allowed.mean() + noise / 8


# the formula


@every_gain
@every_dtype
@with_and_without_norms
def test_it_is_the_formula(gain, dtype, keep_norm):
    x, of = activations(dtype=dtype), constants(gain=gain, keep_norm=keep_norm)
    for shape in [(1, 1), (3, 1), (1, 5), (3, 5)]:
        assert_errs_no_more(fused(x, strengths(*shape), of), x, strengths(*shape), of)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("clip", CLIPS)
def test_any_number_of_directions_and_any_bounds(k, clip):
    x, of = activations(dtype=torch.bfloat16), constants(k, gain="norm", clip=clip, keep_norm=True)
    assert_errs_no_more(fused(x, strengths(3, 1), of), x, strengths(3, 1), of)
    assert_errs_no_more(fused(x.float(), strengths(3, 1), of), x.float(), strengths(3, 1), of)


@pytest.mark.parametrize("d_model", [1, 7, 33, 128, 1000, 2048, 4096 + 3, 16_384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(d_model, dtype):
    x, of = activations(1, 3, d_model, dtype), constants(2, d_model, "norm", keep_norm=True)
    assert_errs_no_more(fused(x, strengths(1, 3), of), x, strengths(1, 3), of)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 1), (1, 16), (1, 17), (5, 9), (0, 3), (3, 0), (0, 0)])
def test_any_number_of_rows_and_tokens(shape):
    x, of = activations(*shape), constants(gain="norm", keep_norm=True)
    for strength in (strengths(1, 1), strengths(*shape)):
        assert_errs_no_more(fused(x, strength, of), x, strength, of)


def directions(k: int) -> edits.Directions:
    write, read = random(2, k, D, seed=4).cpu()
    write = write / write.norm(dim=-1, keepdim=True)
    read = read / (read * write).sum(-1, keepdim=True)
    return edits.Directions(write, read, torch.linspace(-0.5, 0.5, k), torch.ones(k))


@pytest.mark.parametrize("name", edits.KINDS)
@with_and_without_norms
def test_every_edit(name, keep_norm):
    takes, k = edits.options_of(name), 2 if "theta" in edits.options_of(name) else 1
    values = {"unit": ("step", torch.linspace(0.5, 2, k)), "target": ("target", 0.5), "theta": ("theta", 0.8)}
    constants = edits.KINDS[name](directions(k), **dict(values[option] for option in takes))
    of = replace(constants, keep_norm=keep_norm).to(DEVICE)
    for dtype in DTYPES:
        x = activations(dtype=dtype)
        edited = fused(x, strengths(3, 1), of)
        assert_errs_no_more(edited, x, strengths(3, 1), of)
        assert not torch.equal(edited, x)


@with_and_without_norms
def test_without_a_projection_coefficients_are_clipped_too(keep_norm):
    of = constants(keep_norm=keep_norm, needs_projection=False)
    assert (of.offset.abs() > 0.5).any()
    assert_errs_no_more(fused(activations(), strengths(3, 1), of), activations(), strengths(3, 1), of)


def test_without_a_projection_nothing_is_read_along():
    of = constants(needs_projection=False)
    poisoned = replace(of, read=torch.full_like(of.read, math.nan), slope=torch.full_like(of.slope, math.nan))
    assert torch.equal(fused(activations(), strengths(1, 1), poisoned), fused(activations(), strengths(1, 1), of))


@pytest.mark.parametrize(("tokens", "d_model"), [(40, D), (3, 4096)])
def test_a_token_does_not_depend_on_its_neighbours(tokens, d_model):
    x, of = activations(2, tokens, d_model), constants(d_model=d_model, gain="norm", keep_norm=True)
    together = fused(x, strengths(2, tokens), of)
    for row, token in [(0, 0), (1, 2), (0, tokens - 1)]:
        here = slice(row, row + 1), slice(token, token + 1)
        assert torch.equal(fused(x[here], strengths(2, tokens)[here], of), together[here])


def test_what_is_left_of_nothing_is_zeros():
    basis, ones, free = torch.eye(D, device=DEVICE)[:1], torch.ones(1, device=DEVICE), math.inf
    of = Coefficients(basis, basis, -ones, 0 * ones, -free * ones, free * ones, keep_norm=True)
    x = torch.cat([5 * basis, 0 * basis])[None]
    assert (fused(x, torch.ones(1, 1, device=DEVICE), of) == 0).all()


@every_gain
def test_a_nan_in_scope_stays_one(gain):
    x = activations()
    x[1, 2, 3] = math.nan
    edited = fused(x, torch.ones(1, 1, device=DEVICE), constants(gain=gain, clip="both"))
    assert torch.equal(edited.isnan(), reference.edit(x, torch.ones(1, 1, device=DEVICE), constants(gain=gain)).isnan())


# what is not named is not touched


@every_dtype
@every_gain
@with_and_without_norms
def test_strength_zero_is_the_identity_bit_by_bit(dtype, gain, keep_norm):
    x, of = activations(dtype=dtype), constants(gain=gain, keep_norm=keep_norm)
    x[0, 0], x[1, 1], x[2, 2] = math.inf, math.nan, -0.0
    for nothing in (torch.zeros(1, 1, device=DEVICE), torch.full((3, 1), -0.0, device=DEVICE)):
        assert torch.equal(bits(fused(x, nothing, of)), bits(x))


@every_gain
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_tokens_out_of_scope_pass_through_and_do_not_spread(gain, poison):
    of, strength = constants(gain=gain, keep_norm=True), torch.ones(3, 5, device=DEVICE)
    clean = fused(activations(), strength, of)
    x = activations()
    x[0, 1], x[2, 4], strength[0, 1], strength[2, 4] = poison, -poison, 0, 0
    edited = fused(x, strength, of)
    assert torch.equal(edited[strength != 0], clean[strength != 0])
    assert torch.equal(bits(edited)[strength == 0], bits(x)[strength == 0])


# memory


@every_dtype
@pytest.mark.parametrize(("rows", "tokens", "d_model"), [(3, 5, D), (1, 17, 33), (2, 2, 1000)])
def test_every_place_is_written_and_no_other(dtype, rows, tokens, d_model, monkeypatch):
    x, of, around = activations(rows, tokens, d_model, dtype), constants(d_model=d_model), 16 * 1024
    expected = fused(x, strengths(rows, 1), of)
    poisoned = torch.full((x.numel() + 2 * around,), math.nan, dtype=dtype, device=DEVICE)
    inside = poisoned[around:-around].view(x.shape)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **how: inside)
    edited = fused(x, strengths(rows, 1), of)
    assert torch.equal(edited, expected)
    assert edited.data_ptr() == inside.data_ptr()
    assert poisoned.isfinite().sum() == x.numel()


def test_a_stream_amid_poison_reads_no_more_than_its_own():
    poisoned = torch.full((5, 7, D + 2), math.nan, device=DEVICE)
    poisoned[1:-1, 1:-1, 1:-1] = x = activations()
    of = constants(3, gain="norm", keep_norm=True)
    assert torch.equal(fused(poisoned[1:-1, 1:-1, 1:-1], strengths(3, 5), of), fused(x, strengths(3, 5), of))


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows": lambda x: x[::2],
    "tokens": lambda x: x[:, 1::2],
    "dimensions": lambda x: torch.stack([x, -x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_in_any_order(view, dtype):
    x, of = view(activations(dtype=dtype)), constants(gain="norm", keep_norm=True)
    before, strength = x.clone(), strengths(*x.shape[:2])
    plain = fused(before.contiguous(), strength, of)
    assert torch.equal(fused(x, strength, of), plain)
    assert torch.equal(fused(x, strength.mT.contiguous().mT, of), plain)
    assert torch.equal(x, before)


def test_knowing_that_every_strength_counts_changes_nothing():
    x, of, strength = activations(), constants(gain="norm", keep_norm=True), strengths(3, 5)
    assert torch.equal(fused(x, strength, of, everywhere=True), fused(x, strength, of))


def test_constants_in_any_order_and_dtype():
    of = constants(3)
    other = replace(widened(of), read=of.read.mT.contiguous().mT, write=of.write[:1].expand(3, -1))
    expected = replace(of, write=of.write[:1].expand(3, -1).clone())
    assert torch.equal(
        fused(activations(), strengths(3, 1).double(), other), fused(activations(), strengths(3, 1), expected)
    )


# rounding


def written(values: Tensor) -> Tensor:
    """`values` as bfloat16: what the edit of a zero token makes of them when it writes them once."""
    one = torch.ones(1, device=DEVICE)
    of = Coefficients(values[None], values[None], 0 * one, one, one, one, needs_projection=False)
    zero = torch.zeros(1, 1, len(values), dtype=torch.bfloat16, device=DEVICE)
    return fused(zero, one[None], of)[0, 0]


def nans() -> Tensor:
    """The usual one, and those of all ones, which GPUs make: adding to their bits runs over."""
    return torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).to(DEVICE)


def test_to_the_nearest_bfloat16():
    patterns = torch.randint(-(2**31), 2**31, (2000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = patterns & -65536 | 0x8000
    values = torch.cat([patterns, ties, ties - 1, ties + 1]).view(torch.float32).to(DEVICE)
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.float32).tiny)]
    edges = torch.tensor([math.inf, -math.inf, 0.0, 3.4e38, -3.4e38, 3.3961775e38], device=DEVICE)
    values = torch.cat([values, edges])
    assert torch.equal(bits(written(values)), bits(values.to(torch.bfloat16)))
    assert written(nans()).isnan().all()


# gradients


def gradients_of(implementation, x, strength, of, weights, learned=range(8)) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(i in learned) for i, t in enumerate((x, strength, *of.tensors))]
    x, strength, read, write, slope, offset, low, high = leaves
    given = replace(of, read=read, write=write, slope=slope, offset=offset, low=low, high=high)
    (implementation(x, strength, given) * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


@every_gain
@with_and_without_norms
@every_dtype
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_gradients_are_those_of_the_reference(impl, gain, keep_norm, dtype, monkeypatch):
    monkeypatch.setattr(ops, "WITH_KERNELS", (DEVICE,))
    of = constants(3, gain=gain, keep_norm=keep_norm)
    x, strength, weights = activations(dtype=dtype), strengths(3, 1), activations(dtype=dtype).flip(0)
    strength[1] = 0
    mine, theirs = (gradients_of(f, x, strength, of, weights) for f in (ops.pick(impl), reference.edit))
    for got, expected in zip(mine, theirs, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("learned", range(8))
def test_whatever_is_learned_has_its_gradient(learned):
    args = activations(), strengths(3, 1), constants(), activations().flip(0), [learned]
    mine, theirs = gradients_of(fused, *args)[learned], gradients_of(reference.edit, *args)[learned]
    assert mine.abs().sum() > 0
    assert torch.equal(mine, theirs)


def test_where_no_gradient_is_needed_the_kernel_runs(monkeypatch):
    x, expected = activations(), fused(activations(), strengths(3, 1), constants())
    monkeypatch.delattr(reference, "edit")
    assert torch.equal(fused(x, strengths(3, 1), constants()), expected)
    with torch.no_grad():
        assert torch.equal(fused(x.requires_grad_(), strengths(3, 1), constants()), expected)


# as PyTorch knows it


def test_pytorch_finds_nothing_amiss():
    ops.pick("triton")
    for x in (activations(), activations()[:, :1], activations().mT.contiguous().mT):
        torch.library.opcheck(torch.ops.repe.edit, (x, strengths(3, 1), [*constants().tensors], "norm", True, True))


def test_what_a_tensor_without_numbers_becomes_is_known():
    with FakeTensorMode() as mode:
        x, strength, *tensors = map(mode.from_tensor, (activations(), strengths(3, 1), *constants().tensors))
        edited = fused(x, strength, Coefficients(*tensors))
    assert isinstance(edited, FakeTensor)
    assert (edited.shape, edited.dtype, edited.device) == (x.shape, x.dtype, x.device)


def test_compiled_code_stays_whole_and_is_not_compiled_again():
    torch._dynamo.reset()
    counter, of = CompileCounterWithBackend("aot_eager"), constants(gain="norm", keep_norm=True)

    def layer(x, strength):
        return fused(x + 1, strength, of) * 2

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for start in range(3):
        of.write.add_(start)
        strength = strengths(3, 1) * (start - 1)
        assert torch.equal(compiled(activations(), strength), layer(activations(), strength))
    assert counter.frame_count == 1


def test_gradients_of_compiled_code():
    torch._dynamo.reset()
    of, weights = constants(gain="norm", keep_norm=True), activations().flip(0)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    mine, theirs = (gradients_of(f, activations(), strengths(3, 1), of, weights) for f in (compiled, reference.edit))
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_steering_a_model():
    model, vector = zoo.build("llama").to(DEVICE), oracles.vector()
    batch = {name: value.to(DEVICE) for name, value in zoo.inputs("llama").items()}

    def steered(run, impl):
        with repe.steer(model, vector, 1.5, impl=impl, scope="answer", keep_norm=True):
            return run(**batch, use_cache=False).logits

    expected = steered(model, "reference")
    torch.testing.assert_close(steered(model, "triton"), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(steered(compiled, "triton"), expected, atol=1e-5, rtol=1e-5)


# which implementation


@pytest.fixture
def calls(monkeypatch):
    """What "auto" ran, with the kernel for this device."""
    seen, kernels = [], sys.modules[ops.pick("triton").__module__]
    kernel = kernels.edit
    monkeypatch.setattr(ops, "WITH_KERNELS", (DEVICE,))
    monkeypatch.setattr(kernels, "edit", lambda *args, **how: (seen.append("triton"), kernel(*args, **how))[1])
    monkeypatch.setattr(ops, "edit", lambda *args, **how: (seen.append("reference"), reference.edit(*args, **how))[1])
    ops.auto(torch.zeros(0, 0, D, device=DEVICE), torch.ones(1, 1, device=DEVICE), constants())  # looks for the kernel
    seen.clear()
    yield seen
    ops._working_kernels.cache_clear()


def test_auto_is_the_kernel_where_it_works(calls):
    of, x = constants(), activations()
    assert torch.equal(ops.auto(x, strengths(3, 1), of), fused(x, strengths(3, 1), of))
    assert calls == ["triton", "triton"]


def test_auto_is_the_reference_where_the_kernel_does_not_reach(calls):
    for of in (constants(17), no_constants()):
        expected = reference.edit(activations(), strengths(3, 1), of)
        assert torch.equal(ops.auto(activations(), strengths(3, 1), of), expected)
    assert calls == ["reference", "reference"]


def test_auto_is_the_reference_in_compiled_code(calls):
    torch._dynamo.reset()
    compiled = torch.compile(ops.auto, backend="aot_eager", fullgraph=True)
    compiled(activations(), strengths(3, 1), constants())
    assert set(calls) == {"reference"}


TRANSFORMS = {
    "grad": lambda edit, x, *more: torch.func.grad(lambda x: edit(x, *more).square().sum())(x),
    "vmap": lambda edit, x, *more: torch.vmap(lambda x: edit(x, *more))(torch.stack([x, -x])),
    "jvp": lambda edit, x, *more: torch.func.jvp(lambda x: edit(x, *more), (x,), (x,))[1],
    "dual numbers": lambda edit, x, *more: tangent_of(edit, x, *more),
}


def tangent_of(edit, x: Tensor, *more) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(edit(forward_ad.make_dual(x, x), *more)).tangent


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_transforms_are_left_to_the_reference(transform, calls):
    args = activations(), strengths(3, 1), constants()
    with pytest.raises(
        ValueError, match=r"neither forward-mode derivatives nor the transforms of torch.func; use impl="
    ):
        transform(fused, *args)
    assert torch.equal(transform(ops.auto, *args), transform(reference.edit, *args))
    assert calls == ["triton", "reference"]


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_transforms_in_compiled_code_are_refused_too(transform):
    torch._dynamo.reset()
    compiled = torch.compile(TRANSFORMS[transform], backend="aot_eager", fullgraph=True)
    with pytest.raises(Unsupported, match=r"neither forward-mode derivatives nor the transforms of torch.func"):
        compiled(fused, activations(), strengths(3, 1), constants())


def test_auto_leaves_other_tensors_to_the_reference(calls):
    class Sharded(Tensor):
        pass

    ops.auto(activations().as_subclass(Sharded), strengths(3, 1), constants())
    ops.auto(torch.nn.Parameter(activations()), strengths(3, 1), constants())
    assert calls == ["reference", "triton"]


def refused(message, x=None, strength=None, of=None):
    with pytest.raises(ValueError, match=message):
        fused(
            activations() if x is None else x,
            torch.ones(1, 1, device=DEVICE) if strength is None else strength,
            constants() if of is None else of,
        )


def test_what_the_kernel_does_not_reach_is_refused():
    refused(
        "impl='triton': the kernel takes 1 to 16 directions, got 0; use impl='auto' or 'reference'", of=no_constants()
    )
    refused("takes 1 to 16 directions, got 17", of=constants(17))
    refused("holds a token of at most 16384 dimensions, got 16385", activations(1, 1, 16_385), of=constants(1, 16_385))
    refused(r"got torch.float8_e4m3fn", activations().to(torch.float8_e4m3fn))
    refused(r"activations of shape \(rows, tokens, 24\), got \(3, 5, 23\)", activations(d_model=23))
    refused(r"activations of shape \(rows, tokens, 24\), got \(5, 24\)", activations()[0])
    refused(r"strength of shape \(rows or 1, tokens or 1\), got \(2, 1\) for \(3, 5, 24\)", strength=strengths(2, 1))
    refused(r"strength of shape .* got \(1,\) for", strength=strengths(1))
    refused(r"strength of shape .* got \(3, 5, 24\) for", strength=strengths(3, 5, 24))
    refused(r"must be on one device, got \['\w+(:0)?', 'meta'\]", strength=strengths(1, 1).to("meta"))


# what needs no interpreter


def test_the_probe_refuses_a_kernel_that_does_something_else(monkeypatch):
    from repe.ops import kernel as kernel_file

    kernel_file.probe(torch.device(DEVICE))
    edit = kernel_file.edit
    monkeypatch.setattr(kernel_file, "edit", lambda *args: edit(*args) * 1.01)
    with pytest.raises(RuntimeError, match=r"does not do in torch\.float32 what plain PyTorch does"):
        kernel_file.probe(torch.device(DEVICE))


FOR_A_GPU = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from repe.ops import kernel as kernel_file

kernel, names = kernel_file._kernel, kernel_file._kernel.arg_names


def ptx(dtype, d_model, k, **fixed):
    blocks = dict(zip(("BLOCK_T", "BLOCK_D", "BLOCK_K"), kernel_file.blocks_of(d_model, k)))
    fixed |= {"D": d_model, "K": k, "WIDE": tl.float32, "x_dim": 1, **blocks}
    types = {"x": f"*{dtype}", "out": f"*{dtype}"} | dict.fromkeys(names[2:9], "*fp32")
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in ("x_row", "x_token")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    numbers = blocks["BLOCK_T"] * blocks["BLOCK_D"]
    options = {"num_warps": kernel_file.warps_of(numbers), "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


streams = ptx("bf16", 2048, 1, GAIN="one", NEEDS_PROJECTION=True, KEEP_NORM=False)
assert streams.count("ld.global.v4") == 2 + 2 * 4, streams.count("ld.global.v4")
assert streams.count("st.global.v4") == 2, streams.count("st.global.v4")
ptx("fp16", 33, 3, GAIN="sign", NEEDS_PROJECTION=True, KEEP_NORM=False)
ptx("fp32", 64, 16, GAIN="norm", NEEDS_PROJECTION=True, KEEP_NORM=True)
ptx("bf16", 64, 1, GAIN="one", NEEDS_PROJECTION=False, KEEP_NORM=False)
"""


def run(*command: str, **environment: str) -> None:
    """Another Python, with this environment besides its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=kept | environment)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


KERNEL_TESTS = [name for name in globals() if name.startswith("test_")]
if not RUNS_HERE:
    for name in KERNEL_TESTS:
        del globals()[name]

    def test_all_that_triton_interprets():
        run("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")


if not INTERPRETED:

    def test_it_compiles_for_a_gpu_and_loads_sixteen_bytes_at_a_time(tmp_path):
        run("-W", "error", "-c", FOR_A_GPU, TRITON_CACHE_DIR=str(tmp_path))
