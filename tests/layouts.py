"""Batches of prompts padded anywhere, for hypothesis to draw: what a loop over single tokens says of each."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Layout:
    """A batch of prompts padded anywhere, and tokens written after it: what a loop over its tokens says of each."""

    mask: list[list[bool]]
    n_written: int
    slots: list[int]
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [sum(row) for row in self.mask]

    @property
    def positions(self) -> list[list[int | None]]:
        """The position of every slot asked for; None at padding."""
        table = []
        for row in self.mask:
            counter, places = 0, []
            for real in row + [True] * self.n_written:
                places.append(counter if real else None)
                counter += real
            table.append([places[slot] for slot in self.slots])
        return table

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.slots), torch.tensor(self.mask)


@st.composite
def layouts(draw) -> Layout:
    rows, width, written = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(0, 4))
    row = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    first = draw(st.integers(0, width + written - 1))
    last = draw(st.integers(first, width + written - 1))
    return Layout([draw(row) for _ in range(rows)], written, list(range(first, last + 1)))
