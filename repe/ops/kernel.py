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

import torch
import triton
import triton.language as tl
from torch import Tensor

from repe.ops import reference
from repe.ops.reference import DTYPES, Coefficients
from repe.ops.watched import needs_gradient, under_a_transform

MOST_DIRECTIONS = 16
WIDEST = 16_384
HELD = 2048  # numbers of the stream in a program that holds several tokens
MOST_TOKENS = 16  # of a program
NUMBERS_A_WARP = 512  # 16 a thread


@triton.jit
def _to_bfloat16(wide):
    """To the nearest, ties to even, by the bits: Triton's interpreter only cuts them off."""
    bits = wide.to(tl.uint32, bitcast=True)
    nearest = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16) << 16
    return tl.where(tl.abs(wide) < float("inf"), nearest.to(tl.float32, bitcast=True), wide).to(tl.bfloat16)


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
    n_tokens,
    tokens_a_row,
    x_row,
    x_token,
    x_dim,
    strength_row,
    strength_token,
    D: tl.constexpr,
    K: tl.constexpr,
    GAIN: tl.constexpr,
    KEEP_NORM: tl.constexpr,
    NEEDS_PROJECTION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, token = number // tokens_a_row, number % tokens_a_row
    exists = number < n_tokens
    amount = tl.load(strength + row * strength_row + token * strength_token, mask=exists, other=0).to(WIDE)
    d, k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    is_dim, is_direction = d < D, k < K
    held = exists[:, None] & is_dim[None, :]
    at = x + (row * x_row + token * x_token)[:, None] + d.to(tl.int64)[None, :] * x_dim
    before = tl.load(at, mask=held, other=0)
    wide = before.to(WIDE)

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
        edited = edited * (_norm(wide) / tl.where(norm == 0, 1, norm))[:, None]
    rounded = _to_bfloat16(edited) if before.dtype == tl.bfloat16 else edited.to(before.dtype)
    tl.store(out + (number * D)[:, None] + d[None, :], tl.where((amount != 0)[:, None], rounded, before), mask=held)


INTERPRETED = not isinstance(_kernel, triton.JITFunction)


def blocks_of(d_model: int, k: int) -> tuple[int, int, int]:
    """What a program holds: tokens, dimensions and directions, each a power of two."""
    wide = triton.next_power_of_2(d_model)
    return min(MOST_TOKENS, max(1, HELD // wide)), wide, triton.next_power_of_2(k)


def warps_of(numbers: int) -> int:
    return min(16, max(4, numbers // NUMBERS_A_WARP))


def _launch(
    x: Tensor, strength: Tensor, constants: list[Tensor], gain: str, keep_norm: bool, needs_projection: bool
) -> Tensor:
    out = _empty(x)
    if x.numel() == 0:
        return out
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
            rows * tokens,
            tokens,
            *x.stride(),
            *strength.stride(),
            D=d_model,
            K=k,
            GAIN=gain,
            KEEP_NORM=keep_norm,
            NEEDS_PROJECTION=needs_projection,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            num_warps=warps_of(block_t * block_d),
            enable_fp_fusion=True,
        )
    return out


def _empty(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operator = torch.library.custom_op("repe::edit", _launch, mutates_args=())  # as compilers know it
_operator.register_fake(_empty)


def edit(x: Tensor, strength: Tensor, coefficients: Coefficients, *, everywhere: bool = False) -> Tensor:
    """What `reference.edit` does, in one kernel, which looks at every strength anyway. Where a gradient is needed it is
    `reference.edit`, which autograd can look into.

    Raises:
        ValueError: the kernel does not cover the call.
    """
    if obstacle := why_not(x, strength, coefficients):
        raise ValueError(f"impl='triton': {obstacle}; use impl='auto' or 'reference'")
    if needs_gradient(x, strength, *coefficients.tensors):
        return reference.edit(x, strength, coefficients, everywhere=everywhere)
    # asking the dispatcher takes longer than a small edit
    run = _operator if torch.compiler.is_compiling() or type(x) is not Tensor else _launch
    how = coefficients.gain, coefficients.keep_norm, coefficients.needs_projection
    return run(x, strength, [*coefficients.tensors], *how)


def why_not(x: Tensor, strength: Tensor, coefficients: Coefficients) -> str:
    """What the kernel does not cover of a call, in words; nothing where it covers all."""
    k, d_model = coefficients.read.shape
    devices = {t.device for t in (x, strength, *coefficients.tensors)}
    if under_a_transform():
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
