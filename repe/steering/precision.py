"""What a dtype does to an edit: too small for bfloat16 to hold, or too large for the stream. Nothing waits for it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from repe.ops.watched import under_a_transform

LARGEST = 1e18  # length of an activation: models compute the squares in float32, and end in zeros or NaN soon after
LOST_IN_BFLOAT16 = 0.002  # of the activation's norm: about half the spacing of bfloat16 numbers, 2 ** -8


class Precision:
    """Watches the edits of one handle."""

    def __init__(self) -> None:
        self._checked: dict[int, tuple[torch.dtype, int]] = {}
        self._overflowed: Tensor | None = None
        self._dtype = torch.float32  # in which it did
        self._warned = False

    def is_new(self, block: int, dtype: torch.dtype, version: int) -> bool:
        """Whether a block's edit of this version has not been looked at in this dtype, which makes it so."""
        new = self._checked.get(block) != (dtype, version)
        self._checked[block] = dtype, version
        return new

    def check(self, block: int, dtype: torch.dtype, added: float, norm: float) -> None:
        """Looks at an addition of length `added` to activations whose mean norm is `norm`.

        Raises OverflowError if the dtype cannot hold it, or a norm its square; warns once where bfloat16 rounds most of
        it away.
        """
        if not added < min(torch.finfo(dtype).max, LARGEST):
            self._checked.pop(block)
            raise OverflowError(f"the edit adds {added:.2g} at block {block}, more than {dtype} holds: lower alpha")
        if dtype == torch.bfloat16 and 0 < added < LOST_IN_BFLOAT16 * norm and not self._warned:
            self._warned = True
            warnings.warn(
                f"at block {block} the edit is {added / norm:.2%} of the activation's norm, and bfloat16 rounds most "
                "of it away: raise alpha, steer fewer blocks, or load the model in float32",
                UserWarning,
                stacklevel=2,
            )

    def note(self, hidden: Tensor, strength: Tensor, edited: Tensor, keeps_norm: bool = False) -> None:
        """Remembers on the device whether the edit made an activation too large, or nothing of one whose norm it keeps.
        `strength` is (rows or 1, tokens or 1)."""
        if under_a_transform():
            return
        before, after = (torch.linalg.vector_norm(x.detach(), dim=-1, dtype=_wide(x)) for x in (hidden, edited))
        lost = (before < LARGEST) & (~(after < LARGEST) | ((after < before / 2) & keeps_norm))
        found = (lost & (strength != 0)).any()
        self._overflowed = found if self._overflowed is None else found | self._overflowed.to(found.device)
        self._dtype = edited.dtype

    def overflow(self) -> str:
        """What to say of the activations noted since the last time: nothing, where all were finite."""
        found, self._overflowed = self._overflowed, None
        if found is None or not bool(found):
            return ""
        name, is_narrow = str(self._dtype).removeprefix("torch."), self._dtype == torch.float16
        more = ", pass keep_norm=True, or load the model in bfloat16 or float32" if is_narrow else ", or the target"
        return f"steered activations overflowed {name}: lower alpha{more}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
