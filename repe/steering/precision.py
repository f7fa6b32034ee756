"""What a dtype does to an edit: too small for bfloat16 to hold, or too large for the stream. Nothing waits for it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

LOST_IN_BFLOAT16 = 0.002  # of the activation's norm: about half the spacing of bfloat16 numbers, 2 ** -8


class Precision:
    """Watches the edits of one handle."""

    def __init__(self) -> None:
        self._checked: dict[int, tuple[torch.dtype, int]] = {}
        self._overflowed: Tensor | None = None
        self._warned = False

    def is_new(self, block: int, dtype: torch.dtype, version: int) -> bool:
        """Whether a block's edit of this version has not been looked at in this dtype, which makes it so."""
        new = self._checked.get(block) != (dtype, version)
        self._checked[block] = dtype, version
        return new

    def check(self, block: int, dtype: torch.dtype, added: float, norm: float) -> None:
        """Looks at an addition of length `added` to activations whose mean norm is `norm`.

        Raises OverflowError if the dtype cannot hold it; warns once where bfloat16 rounds most of it away.
        """
        if not added < torch.finfo(dtype).max:
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

    def note(self, hidden: Tensor, strength: Tensor, edited: Tensor) -> None:
        """Remembers on the device whether the edit made a finite activation overflow; only float16 does so within
        reach. `strength` is (rows or 1, tokens or 1)."""
        if edited.dtype == torch.float16:
            lost = hidden.detach().isfinite().all(-1) & ~edited.detach().isfinite().all(-1)
            found = (lost & (strength != 0)).any()
            self._overflowed = found if self._overflowed is None else found | self._overflowed.to(found.device)

    def overflow(self) -> str:
        """What to say of the activations noted since the last time: nothing, where all were finite."""
        found, self._overflowed = self._overflowed, None
        if found is None or not bool(found):
            return ""
        return (
            "steered activations overflowed float16: lower alpha, pass keep_norm=True, or load the model in bfloat16 "
            "or float32"
        )
