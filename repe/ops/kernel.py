"""The edit formula as one Triton kernel: one read and one write of the stream.

A program holds a few tokens in registers, d_model in one piece, and reads the directions one after another. Its
arithmetic is that of `ops/reference.py`, in float32 (float64 for float64 activations). How many tokens a program holds
depends on d_model alone, so that a token's result does not depend on how many others there are.

Importing this file imports Triton, so nothing does so before the kernel is wanted. The numbers of tokens and of warps
that a program gets are reasoned, not measured.
"""

# A kernel's arguments are pointers and constants of Triton's, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from repe.ops import reference
from repe.ops.gradients import gradients
from repe.ops.reference import DTYPES, Coefficients, check_out, needs_gradient
from repe.ops.rounding import Rounding, check_rounding

MOST_DIRECTIONS = 16
WIDEST = 16_384
HELD = 2048  # numbers of the stream in a program that holds several tokens
MOST_TOKENS = 16  # of a program
NUMBERS_A_WARP = 512  # 16 a thread


@triton.jit
def _mix(h):
    """The hash of `ops/rounding.py`."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _noise(seed, number, d):
    """The randomness of `ops/rounding.py`, for the tokens `number` and the coordinates `d`."""
    seeds = tl.load(seed)
    key = _mix(number.to(tl.uint32) ^ _mix(seeds.to(tl.uint32) ^ _mix((seeds >> 32).to(tl.uint32))))
    return _mix(key[:, None] ^ _mix(d.to(tl.uint32))[None, :]) >> 16


@triton.jit
def _to_bfloat16(wide, bits, noise):
    """Cuts off the low half of `bits + noise`; `bits` are those of the float32 `wide`."""
    cut = ((bits + noise) >> 16) << 16
    return tl.where(tl.abs(wide) < float("inf"), cut.to(tl.float32, bitcast=True), wide).to(tl.bfloat16)


@triton.jit
def _norm(tokens):
    return tl.sqrt(tl.sum(tokens * tokens, axis=1))


@triton.jit(do_not_specialize=["n_tokens", "tokens_a_row", "strength_row", "strength_token"])
def _kernel(
    x,
    out,
    strength,
    read,
    write,
    slope,
    offset,
    low,
    high,
    seed,
    n_tokens,
    tokens_a_row,
    x_row,
    x_token,
    x_dim,
    out_row,
    out_token,
    out_dim,
    strength_row,
    strength_token,
    D: tl.constexpr,
    K: tl.constexpr,
    GAIN: tl.constexpr,
    KEEP_NORM: tl.constexpr,
    NEEDS_PROJECTION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, token = number // tokens_a_row, number % tokens_a_row
    exists = number < n_tokens
    amount = tl.load(strength + row * strength_row + token * strength_token, mask=exists, other=0).to(WIDE)
    on = amount != 0
    d, k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    is_dim, is_direction = d < D, k < K
    held = (on if IN_PLACE else exists)[:, None] & is_dim[None, :]
    at = x + (row * x_row + token * x_token)[:, None] + d.to(tl.int64)[None, :] * x_dim
    before = tl.load(at, mask=held, other=0)
    wide = tl.where(on[:, None], before.to(WIDE), 0)

    c = tl.load(offset + k, mask=is_direction, other=0).to(WIDE)[None, :]
    if NEEDS_PROJECTION:
        p = tl.zeros((BLOCK_T, BLOCK_K), WIDE)
        for i in range(K):
            direction = tl.load(read + i * D + d, mask=is_dim, other=0).to(WIDE)
            p = tl.where(k[None, :] == i, tl.sum(wide * direction[None, :], axis=1)[:, None], p)
        if GAIN == "sign":
            c = c * ((p > 0).to(WIDE) - (p < 0).to(WIDE))
        elif GAIN == "norm":
            c = c * _norm(p)[:, None]
        c = tl.load(slope + k, mask=is_direction, other=0).to(WIDE)[None, :] * p + c
    lowest = tl.load(low + k, mask=is_direction, other=0).to(WIDE)[None, :]
    highest = tl.load(high + k, mask=is_direction, other=0).to(WIDE)[None, :]
    c = tl.where(c < lowest, lowest, c)  # a NaN stays one
    c = amount[:, None] * tl.where(c > highest, highest, c)

    shift = tl.zeros((BLOCK_T, BLOCK_D), WIDE)
    for i in range(K):
        direction = tl.load(write + i * D + d, mask=is_dim, other=0).to(WIDE)
        shift += tl.sum(tl.where(k[None, :] == i, c, 0), axis=1)[:, None] * direction[None, :]
    edited = wide + shift
    if KEEP_NORM:
        norm = _norm(edited)
        ratio = tl.where(norm == 0, 1, _norm(wide) / tl.where(norm == 0, 1, norm))
        edited = edited * ratio[:, None]
    if before.dtype == tl.bfloat16:
        bits = edited.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            rounded = _to_bfloat16(edited, bits, _noise(seed, number, d))
        else:
            rounded = _to_bfloat16(edited, bits, ((bits >> 16) & 1) + 0x7FFF)  # to nearest, ties to even
    else:
        rounded = edited.to(before.dtype)
    to = out + (row * out_row + token * out_token)[:, None] + d.to(tl.int64)[None, :] * out_dim
    tl.store(to, tl.where(on[:, None], rounded, before), mask=held)


INTERPRETED = not isinstance(_kernel, triton.JITFunction)


def blocks_of(d_model: int, k: int) -> tuple[int, int, int]:
    """What a program holds: tokens, dimensions and directions, each a power of two."""
    wide = triton.next_power_of_2(d_model)
    return min(MOST_TOKENS, max(1, HELD // wide)), wide, triton.next_power_of_2(k)


def warps_of(numbers: int) -> int:
    return min(16, max(4, numbers // NUMBERS_A_WARP))


def _launch(
    x: Tensor,
    out: Tensor,
    strength: Tensor,
    constants: tuple[Tensor, ...],
    seed: Tensor | None,
    gain: str,
    keep_norm: bool,
    needs_projection: bool,
) -> None:
    if x.numel() == 0:
        return
    rows, tokens, d_model = x.shape
    k = len(constants[0])
    block_t, block_d, block_k = blocks_of(d_model, k)
    strength = strength.expand(rows, tokens)
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(rows * tokens, block_t),)](
            x,
            out,
            strength,
            *(t.contiguous() for t in constants),
            seed,
            rows * tokens,
            tokens,
            *x.stride(),
            *out.stride(),
            *strength.stride(),
            D=d_model,
            K=k,
            GAIN=gain,
            KEEP_NORM=keep_norm,
            NEEDS_PROJECTION=needs_projection,
            STOCHASTIC=seed is not None,
            IN_PLACE=out.data_ptr() == x.data_ptr(),
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            num_warps=warps_of(block_t * block_d),
            enable_fp_fusion=True,
        )


# as PyTorch knows it


@torch.library.custom_op("repe::edit", mutates_args=())
def _edit(
    x: Tensor,
    strength: Tensor,
    read: Tensor,
    write: Tensor,
    slope: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    seed: Tensor | None,
    gain: str,
    keep_norm: bool,
    needs_projection: bool,
) -> Tensor:
    out = torch.empty_like(x)
    _launch(x, out, strength, (read, write, slope, offset, low, high), seed, gain, keep_norm, needs_projection)
    return out


@_edit.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, _, ctx.gain, ctx.keep_norm, ctx.needs_projection = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, strength, *constants = ctx.saved_tensors
    read, write, slope, offset, low, high = constants
    of = Coefficients(read, write, slope, offset, low, high, ctx.gain, ctx.keep_norm, ctx.needs_projection)
    d = gradients(grad, x, strength, of)
    return d.x, d.strength, d.read, d.write, d.slope, d.offset, d.low, d.high, None, None, None, None


_edit.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("repe::edit_out", mutates_args=("out",))
def _edit_out(
    x: Tensor,
    strength: Tensor,
    read: Tensor,
    write: Tensor,
    slope: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    seed: Tensor | None,
    gain: str,
    keep_norm: bool,
    needs_projection: bool,
    out: Tensor,
) -> None:
    _launch(x, out, strength, (read, write, slope, offset, low, high), seed, gain, keep_norm, needs_projection)


@_edit_out.register_fake
def _(*_: Any) -> None:
    return None


# as `ops` knows it


def edit(
    x: Tensor,
    strength: Tensor,
    coefficients: Coefficients,
    *,
    rounding: Rounding = "nearest",
    seed: Tensor | None = None,
    out: Tensor | None = None,
    everywhere: bool = False,
) -> Tensor:
    """What `reference.edit` does, in one kernel, which looks at every strength anyway.

    Raises:
        ValueError, TypeError: an option cannot be meant, or the kernel does not cover the call.
    """
    if obstacle := why_not(x, strength, coefficients):
        raise ValueError(f"impl='triton': {obstacle}; use impl='auto' or 'reference'")
    check_rounding(x, rounding, seed)
    check_out(x, strength, coefficients, out)
    how = seed, coefficients.gain, coefficients.keep_norm, coefficients.needs_projection
    if torch.compiler.is_compiling() or type(x) is not Tensor or needs_gradient(x, strength, coefficients):
        if out is None:
            return _edit(x, strength, *coefficients.tensors, *how)
        _edit_out(x, strength, *coefficients.tensors, *how, out)
        return out
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # autograd may hold it, and must learn that it was written over
    out = torch.empty_like(x) if out is None else out  # asking the dispatcher takes longer than a small edit
    _launch(x, out, strength, coefficients.tensors, *how)
    return out


def why_not(x: Tensor, strength: Tensor, coefficients: Coefficients) -> str:
    """What the kernel does not cover of a call, in words; nothing where it covers all."""
    k, d_model = coefficients.read.shape
    tensors = x, strength, *coefficients.tensors
    devices = {t.device for t in tensors}
    if not torch.compiler.is_compiling() and _is_transformed(tensors):
        return "the kernel knows neither forward-mode derivatives nor the transforms of torch.func"
    if len(devices) > 1:
        return f"all tensors must be on one device, got {sorted(map(str, devices))}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the kernel runs on GPUs, and the activations are on {x.device}"
    if x.dtype not in DTYPES:
        return f"the kernel knows activations of float32, float16, bfloat16 and float64, got {x.dtype}"
    if x.ndim != 3 or x.shape[-1] != d_model:
        return f"expected activations of shape (rows, tokens, {d_model}), got {tuple(x.shape)}"
    if strength.ndim != 2 or any(n not in (1, m) for n, m in zip(strength.shape, x.shape, strict=False)):
        return (
            f"expected a strength of shape (rows or 1, tokens or 1), got {tuple(strength.shape)} for {tuple(x.shape)}"
        )
    if not 1 <= k <= MOST_DIRECTIONS:
        return f"the kernel takes 1 to {MOST_DIRECTIONS} directions, got {k}"
    if d_model > WIDEST:
        return f"the kernel holds a token of at most {WIDEST} dimensions, got {d_model}"
    return ""


def _is_transformed(tensors: tuple[Tensor, ...]) -> bool:
    return reference.under_a_transform() or any(unpack_dual(t).tangent is not None for t in tensors)


def probe(device: torch.device) -> None:
    """Edits a few tokens, so that whatever keeps Triton from working on the device raises its error here.

    Raises:
        RuntimeError: it runs there, and does not do what the reference does.
    """
    ramp = torch.linspace(-1, 1, 2 * 3 * 96, device=device).sin()
    vectors, constants = ramp[:192].reshape(2, 96), ramp[:2] + 1.5
    coefficients = Coefficients(vectors, vectors.flip(0), -constants, constants, -3 * constants, 3 * constants)
    strength = torch.tensor([[0.0, 1.0, -2.0]], device=device)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        x = ramp.reshape(2, 3, 96).to(dtype)
        found, expected = edit(x, strength, coefficients), reference.edit(x, strength, coefficients)
        if not torch.allclose(found.float(), expected.float(), rtol=allowed, atol=allowed):
            raise RuntimeError(f"the kernel does not do in {dtype} what plain PyTorch does")
