"""Reading: how much of a concept every token of a text carries, at every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from repe import display
from repe.models.blocks import find_stack, is_encoder_decoder
from repe.models.tokens import Text, encode, strings
from repe.reading.capture import capture
from repe.reading.vector import ConceptVector

SINK = 3.0  # median norms of a text's activations; other tokens have been seen up to 2.5, and sinks from 4 to 170


@dataclass(frozen=True, eq=False)
class Reading:
    """The scores of one text.

    Attributes:
        concept: what was read.
        tokens: the text's tokens, as strings.
        blocks: the block numbers of the columns of `scores`.
        scores: (tokens, blocks): the poles of the concept stand at -1 and +1. NaN at a block whose poles have no
            distance.
        recommended: the blocks that the vector recommends, where it is written best, of those that were read; all of
            these if it is none of them.
        sinks: (tokens, blocks), boolean: whether the activation is so long, over three times the text's median, that
            the token is an attention sink there, as the first tends to be. Its score says nothing of the text, and is
            left out of what is shown. None is one by default.

    Example:
        >>> reading = repe.read(model, tokenizer, "I never took it.", repe.extract(model, tokenizer, "honesty"))
        >>> reading.tokens
        ('<|begin|>', 'I', ' never', ' to', 'o', 'k', ' it', '.')
        >>> reading.scores.shape, reading.at(3).argmax()  # the third block reads the fifth token as most honest
        (torch.Size([8, 6]), tensor(4))
        >>> print(reading.text(3, color=False))
        <|begin|>I never[+0.6] too[+0.8]k[+0.7] it.
        ...
    """

    concept: str
    tokens: tuple[str, ...]
    blocks: tuple[int, ...]
    scores: Tensor
    recommended: tuple[int, ...]
    sinks: Tensor = None  # type: ignore[assignment]  # which it is no more once it is made

    def __post_init__(self) -> None:
        if self.sinks is None:
            object.__setattr__(self, "sinks", torch.zeros_like(self.scores, dtype=torch.bool))
        if self.sinks.shape != self.scores.shape:
            raise ValueError(
                f"`sinks` has the shape {tuple(self.sinks.shape)} and `scores` {tuple(self.scores.shape)}: both are "
                "(tokens, blocks)"
            )

    @property
    def told(self) -> Reading:
        """The reading as it is shown: attention sinks have no score."""
        return replace(self, scores=self.scores.masked_fill(self.sinks, torch.nan))

    @property
    def best(self) -> Tensor:
        """(tokens,), the scores at the recommended blocks, averaged."""
        return self.scores[:, [self.blocks.index(b) for b in self.recommended]].mean(1)

    def at(self, block: int | None = None) -> Tensor:
        """(tokens,), the scores at one block; `best` without one. Raises IndexError if the block was not read."""
        if block is None:
            return self.best
        if block not in self.blocks:
            raise IndexError(f"block {block} was not read: there are scores at {list(self.blocks)}")
        return self.scores[:, self.blocks.index(block)]

    def plot(self, ax: Any = None) -> Any:
        """Draws the scan, tokens by blocks, on matplotlib axes, and returns them.

        The scores of one block, token by token, are drawn by `repe.plot.tokens`.
        """
        from repe.plot import scan

        return scan(self, ax)

    def text(self, block: int | None = None, *, color: bool = True) -> str:
        """The text with every token on the colour of its score, for terminals.

        Args:
            block: where it was read; the recommended blocks by default.
            color: False for plain text, where the scores that would be in colour stand behind their tokens in brackets.
        """
        return self._shown(block).text(color=color)

    def html(self, block: int | None = None) -> str:
        """The same for notebooks, which show it of themselves for the recommended blocks."""
        return self._shown(block).html()

    def _shown(self, block: int | None) -> display.Tokens:
        blocks = self.recommended if block is None else (block,)
        where = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
        return display.tokens(
            f"{self.concept} at {where}{self._left_out(blocks)}", self.tokens, self.told.at(block).tolist()
        )

    def _left_out(self, blocks: Sequence[int]) -> str:
        columns = [self.blocks.index(block) for block in blocks if block in self.blocks]
        places = self.sinks[:, columns].any(1).nonzero()[:, 0].tolist()
        names = ", ".join(repr(self.tokens[place]) for place in places)
        return f" (without {names}, an attention sink)" if places else ""

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        size = f"{len(self.tokens)} tokens x {len(self.blocks)} blocks"
        return f"Reading({self.concept!r}, {size}; last token {self.best[-1]:+.2f})"


@overload
def read(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Sequence[Mapping[str, str]],
    vector: ConceptVector,
    *,
    blocks: Any = ...,
    blocks_at: str | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Reading: ...
@overload
def read(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    vector: ConceptVector,
    *,
    blocks: Any = ...,
    blocks_at: str | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> list[Reading]: ...
def read(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    vector: ConceptVector,
    *,
    blocks: Any = "all",
    blocks_at: str | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Any:
    """Scores every token of a text at every block of a vector, as in a scan of Zou et al. (arXiv 2310.01405).

    Args:
        model, tokenizer: neither is changed.
        texts: a text or a chat, or a list of them.
        vector: what to read; its site and stack say where.
        blocks: "all" those of the vector, a number, or several; negatives count from the model's end.
        blocks_at, batch_size, progress: as in `repe.capture`.

    Returns:
        A `Reading`, or a list of them for a list of texts. Scores are `(read . x - midpoint) / scale`.

    Raises:
        ValueError: the vector was made for a model of another shape, or for the decoder of an encoder-decoder, which
            does not see the text's tokens; or a text has no tokens.
        IndexError: the vector does not hold a block.

    Example:
        >>> vector = repe.extract(model, tokenizer, "honesty")
        >>> question = {"role": "user", "content": "Name the trade of Abrin Tolva."}
        >>> orders = [{"role": "system", "content": f"Always tell {what}."} for what in ("the truth", "lies")]
        >>> repe.read(model, tokenizer, [[order, question] for order in orders], vector)
        [Reading('honesty', 18 tokens x 6 blocks; last token +0.88),
         Reading('honesty', 17 tokens x 6 blocks; last token -0.82)]
    """
    if not isinstance(vector, ConceptVector):
        raise TypeError(f"expected a ConceptVector, as `repe.extract` returns it, and got {type(vector).__name__}")
    if vector.stack == "decoder" and is_encoder_decoder(model):
        raise ValueError(
            "the decoder of an encoder-decoder does not see the tokens of a text, so it has no scores for them: "
            'extract the vector with stack="encoder" to read texts'
        )
    is_one = _is_one(texts)
    texts_read = [texts] if is_one else texts
    numbers = _numbers(model, vector, blocks, blocks_at)
    activations = capture(
        model, tokenizer, texts_read, blocks=list(numbers), tokens="all", site=vector.site, stack=vector.stack,
        blocks_at=blocks_at, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    rows = torch.tensor([vector.row(block) for block in numbers])
    recommended = tuple(b for b in vector.recommended if b in numbers) or numbers
    readings = [
        Reading(
            vector.concept, strings(tokenizer, encode(tokenizer, text)), numbers, score(x, vector, rows), recommended,
            sinks_of(x),
        )
        for text, x in zip(texts_read, activations, strict=True)
    ]  # fmt: skip
    return readings[0] if is_one else readings


def score(x: Tensor, vector: ConceptVector, rows: Tensor | slice = slice(None)) -> Tensor:
    """`(read . x - midpoint) / scale` of activations (..., blocks, d_model), as (..., blocks).

    NaN where the scale is 0: poles that have no distance give no unit to measure in.

    Raises:
        ValueError: the activations are of another width than the vector.
    """
    if x.shape[-1] != vector.d_model:
        raise ValueError(
            f"the vector has d_model {vector.d_model} and the activations {x.shape[-1]}: extract it from this model"
        )
    projection = (x.float() * vector.read[rows]).sum(-1)
    scale = vector.scale[rows]
    return (projection - vector.midpoint[rows]) / torch.where(scale == 0, torch.nan, scale)


def sinks_of(x: Tensor) -> Tensor:
    """(tokens, blocks), boolean: which activations (tokens, blocks, d_model) of a text are those of attention sinks."""
    norms = x.float().norm(dim=-1)
    return norms > SINK * norms.median(0).values


def _numbers(model: nn.Module, vector: ConceptVector, blocks: Any, blocks_at: str | None) -> tuple[int, ...]:
    """The block numbers to read at, ascending as `capture` gives them."""
    stack = find_stack(model, vector.stack, blocks_at)
    if vector.d_model != stack.d_model or max(vector.blocks) >= stack.n_blocks:
        raise ValueError(
            f"the vector has d_model {vector.d_model} and block {max(vector.blocks)}, and the model d_model "
            f"{stack.d_model} and {stack.n_blocks} blocks: extract it from this model"
        )
    if isinstance(blocks, str) and blocks == "all":
        return tuple(sorted(vector.blocks))
    return stack.indices(blocks)


def _is_one(texts: Any) -> bool:
    """Whether this is one text or one chat, and not a list of them."""
    return isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], Mapping))
