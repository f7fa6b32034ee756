"""The simplest edit is the edit formula to the last bit, whoever looks on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from repe.ops import Coefficients, edit
from repe.ops.plus import plus

D = 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand(3, -1, -1)])
def test_it_is_the_formula_where_nothing_is_projected(dtype, view):
    direction, one, free = random(1, D, seed=1), torch.ones(1), torch.tensor([math.inf])
    of = Coefficients(direction, direction, 0 * one, one, -free, free, needs_projection=False)
    x = view(random(3, 5, D).to(dtype))
    before = x.clone()
    added = plus(x, of.shift.to(torch.promote_types(dtype, torch.float32)))
    assert added.dtype == dtype
    assert torch.equal(added, edit(x, torch.ones(1, 1), of))
    assert torch.equal(x, before)


def backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    f(x).square().sum().backward()
    return x.grad


def tangent(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


LOOK_ON = {
    "backward": backward,
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, -x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "dual numbers": tangent,
}


@pytest.mark.parametrize("look_on", LOOK_ON.values(), ids=LOOK_ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_whoever_looks_on_sees_an_addition(look_on, dtype):
    x, displacement = random(2, 3, D).to(dtype), random(D, seed=1)
    seen, expected = (
        look_on(f, x) for f in (lambda x: plus(x, displacement), lambda x: (x + displacement).to(x.dtype))
    )
    assert torch.equal(seen, expected)
