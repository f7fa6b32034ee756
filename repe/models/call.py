"""What a model is being asked: which tokens a forward holds, and where the prompt ends.

A block sees hidden states alone. What a scope needs is known further up: the arguments of the stack's forward tell
padding and how much is cached, and the arguments of `generate` tell where the prompt ends, which no counting of
forwards could (chunked prefill, assisted decoding and a second chat turn look alike from inside). The functions here
read those arguments; `tracking.py` brings them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from repe.models.tokens import Columns, positions_at

PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "seq_idx", "block_table", "read_index", "write_index")
GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
UNCOUNTED = "the cache holds a state and does not count its tokens: pass the attention_mask of all tokens so far"
HIDDEN = -1000.0  # what is added to attention where nothing may be seen is far below, -inf or the dtype's least


@dataclass(eq=False)
class Generation:
    """One call of `generate`: what its arguments say of the prompt, and how far its main stream of tokens has come.

    `texts` is the number of rows before beams and `num_return_sequences` repeat them; `prompt_mask` (texts, width) is
    true where not padding; both are None where only the first forward can tell. `guided` says that classifier-free
    guidance runs a second stream of tokens, with a cache and a prompt of its own; `guesses` that tokens are proposed
    beside the prompt, `continues` that the call brought a cache. `virtual` counts the columns before the prompt that
    stand for no text, as those of prompt and prefix tuning. `readers` hold what the gates decided, by the handles'
    serials.
    """

    texts: int | None
    prompt_mask: Tensor | None
    width: int | None
    guided: bool = False
    guesses: bool = False
    continues: bool = False
    cache: Any = None
    started: bool = False
    processed: int = 0
    reached: int = 0
    virtual: int = 0
    end: Any = 0
    main_was_last: bool = False
    readers: dict[int, Any] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)

    def begin(self, cache: Any, end: Any, mask: Tensor | None) -> None:
        """The first forward comes, and reaches to the column `end`; `mask` is true where it is not padding."""
        self.started, self.cache = True, cache
        if self.width is None:
            self.width, self.prompt_mask = end, mask
            return
        if not isinstance(end, int) and torch.compiler.is_compiling():
            return
        extra = int(end) - self.width
        if extra > 0 and not self.guesses:
            if self.prompt_mask is not None or not self.continues:
                ones = torch.ones(1, self.width, dtype=torch.bool)
                kept = ones if self.prompt_mask is None else self.prompt_mask
                self.prompt_mask = pad(kept, (extra, 0), value=self.continues)
            self.virtual = 0 if self.continues else extra
            self.width += extra

    def columns(self, rows: int, device: torch.device) -> Columns | None:
        """The prompt's columns for a batch of so many rows; None if nothing is padding."""
        if self.prompt_mask is None:
            return None
        if torch.compiler.is_compiling():
            return self._columns(self.prompt_mask, rows, device)
        if (rows, device) not in self.known:
            self.known[rows, device] = self._columns(self.prompt_mask, rows, device)
        return self.known[rows, device]

    @staticmethod
    def _columns(mask: Tensor, rows: int, device: torch.device) -> Columns:
        return Columns.of(mask.to(device).repeat_interleave(rows // mask.shape[0], dim=0))

    def whole_width(self, slots: Tensor) -> Tensor:
        """(1, 1), the prompt's length where nothing is padding."""
        assert self.width is not None
        if torch.compiler.is_compiling():
            return slots.new_full((1, 1), self.width)
        if slots.device not in self.known:
            self.known[slots.device] = slots.new_full((1, 1), self.width)
        return self.known[slots.device]

    def advance(self, past: Any, tokens: int, is_first: bool) -> int | None:
        """How many columns stand before a forward of the main stream; None in compiled code, where only the device
        knows."""
        if torch.compiler.is_compiling():
            return past if isinstance(past, int) else None
        before = past if isinstance(past, int) else int(past) if is_first or not self.reached else self.reached
        self.reached = before + tokens
        return before

    def is_main(self, cache: Any) -> bool:
        """Whether a forward belongs to the main stream of tokens. Without caches, guidance runs the two in turns."""
        if not self.guided or cache is not None or self.cache is not None:
            return cache is self.cache or not self.guided
        self.main_was_last = not self.main_was_last
        return self.main_was_last


@dataclass(eq=False, kw_only=True)
class Forward:
    """The tokens of one forward pass through a stack.

    Attributes:
        rows, tokens: the shape of the batch.
        texts: rows before beams repeat them.
        slots: (tokens,), the columns, counted from the first that is cached.
        positions: (rows or 1, tokens), the places in the text.
        valid: (rows or 1, tokens), false at padding; None if nothing is padding.
        prompt_length: (rows or 1, 1), the prompt's tokens without padding; None where nobody can tell.
        is_told: the prompt's length is what the caller said, and not what the arguments tell.
        starts_prompt: the cache is empty.
        may_hold_prompt: some of the tokens may belong to the prompt (of the main stream).
        ends_prompt: once it has run, all of the prompt was seen, as far as the call tells.
        goes_on: it has no cache, and begins as the forward before it did, so that what was written since may be in it.
        unplaced: why nobody can tell where in the text the tokens stand; "" where it is known.
        cache: what holds the keys and values of earlier tokens.
        generation: the call of `generate` that it is part of.
        latest: the serial of the latest handle that was attached when it began.
        strengths: how strongly every token is edited, by a handle's serial and a device, worked out once a forward; and
            whether it is known that no token's is 0.
        uniform: the handles, by serial, that edit every token alike, each with the version of its edit.
    """

    rows: int
    tokens: int
    texts: int
    slots: Tensor
    positions: Tensor
    valid: Tensor | None = None
    prompt_length: Tensor | None = None
    is_told: bool = False
    starts_prompt: bool = False
    may_hold_prompt: bool = True
    ends_prompt: bool = False
    goes_on: bool = False
    unplaced: str = ""
    cache: Any = None
    generation: Generation | None = None
    latest: int = 0
    strengths: dict[tuple[int, torch.device], tuple[Tensor, bool]] = field(default_factory=dict)
    uniform: dict[int, int] = field(default_factory=dict)

    @property
    def is_past_prompt(self) -> bool:
        """Whether it is known that all of its tokens were written by the model."""
        return self.generation is not None and not self.generation.guided and not self.may_hold_prompt


def generation_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
    """What the arguments of `generate` say about the prompt."""
    given: dict[str, Any] = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    guidance = _setting("guidance_scale", given, model)
    ids = given.get("inputs")
    ids = given.get("input_ids") if ids is None else ids
    embeds = given.get("inputs_embeds")
    prompt = ids if embeds is None else embeds
    how: dict[str, Any] = {
        "guided": guidance is not None and guidance != 1,
        "guesses": any(_setting(name, given, model) for name in GUESSING),
        "continues": given.get("past_key_values") is not None or given.get("cache_params") is not None,
    }
    texts = None if prompt is None else prompt.shape[0]
    if prompt is None or model.config.is_encoder_decoder:
        return Generation(texts, None, None, **how)
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return Generation(texts, mask.bool(), mask.shape[1], **how)
    padding = _inferred_padding(prompt, given, model) if embeds is None else None
    return Generation(texts, padding, prompt.shape[1], **how)


def _setting(name: str, given: Mapping[str, Any], model: Any) -> Any:
    """What `generate` goes by: the argument, else the given configuration, and what that leaves open the model's."""
    if name in given:
        return given[name]
    value = getattr(given.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if value is None else value


def _inferred_padding(ids: Tensor, given: Mapping[str, Any], model: Any) -> Tensor | None:
    """The padding that `generate` infers where no mask is given: pad tokens, unless they may also end a text."""
    pad_id, end = (_setting(name, given, model) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, list | tuple) else [end]
    if pad_id is None or pad_id in ends or ids.dtype not in (torch.int, torch.long):
        return None
    return ids != pad_id


# one forward


def forward_of(inputs: Mapping[str, Any], generation: Generation | None, told: Tensor | None = None) -> Forward:
    """The tokens that the arguments of a stack's forward describe, inside or outside of a generation.

    Args:
        inputs: the arguments, by name.
        generation: the call of `generate` that the forward is part of.
        told: (rows or 1, 1), the prompts' lengths as the caller says them, for a forward outside of a generation.

    Raises:
        ValueError: rows that hold several texts, or no tokens at all.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("got a forward of a stack with neither `input_ids` nor `inputs_embeds`: pass one of them")
    cache = inputs.get("past_key_values")
    cache = inputs.get("cache_params") if cache is None else cache
    given = _one_mask(inputs.get("attention_mask"))
    mask = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
    rows, width = tokens.shape[:2]
    past = _past(cache, mask, width, generation)
    slots = torch.arange(width, device=tokens.device)
    _refuse_packed(inputs, given, cache, slots)
    if past is None:
        valid = _own(given, slots) if mask is None else mask
        return _told(
            Forward(
                rows=rows, tokens=width, texts=rows, slots=slots, positions=slots[None], valid=valid,
                unplaced=UNCOUNTED, cache=cache, generation=generation,
            ),
            told,
        )  # fmt: skip
    slots = slots + past
    if generation is None:
        return _told(_bare(rows, slots, given, past, cache), told)
    return _within(generation, rows, slots, given, past, cache)


def _told(forward: Forward, told: Tensor | None) -> Forward:
    """The forward with what the caller says of its prompts."""
    if told is None or forward.generation is not None:
        return forward
    forward.prompt_length, forward.is_told = told.to(forward.slots.device), True
    return forward


def _bare(rows: int, slots: Tensor, given: Any, past: Any, cache: Any) -> Forward:
    """A forward outside `generate`: on an empty cache it is all prompt, on a filled one nobody can tell."""
    tokens, starts = slots.shape[0], _is_zero(past)
    mask, length = given, None
    if given is not None and (not isinstance(given, Tensor) or given.ndim != 2):
        mask = _own(given, slots)
        if mask is None:
            raise ValueError(
                f"got an attention_mask that does not tell what is padding, {_shape_of(given)}: pass one of (rows, "
                "columns), or of (rows, 1, tokens, columns)"
            )
        if not starts:
            unplaced = "an attention_mask of more than two dimensions does not tell what of the cache is padding"
            return Forward(
                rows=rows, tokens=tokens, texts=rows, slots=slots, positions=slots[None], valid=mask,
                unplaced=unplaced, cache=cache,
            )  # fmt: skip
    if mask is not None and isinstance(past, int) and mask.shape[1] < past + tokens:
        raise ValueError(
            f"the attention_mask has {mask.shape[1]} columns, and {past} cached and {tokens} new tokens need "
            f"{past + tokens}: a mask covers what is cached too"
        )
    positions, valid = positions_at(slots, mask)
    if starts:
        length = slots.new_full((1, 1), tokens) if mask is None else mask[:, :tokens].bool().sum(1, keepdim=True)
    return Forward(
        rows=rows, tokens=tokens, texts=rows, slots=slots, positions=positions, valid=valid, prompt_length=length,
        starts_prompt=starts, ends_prompt=starts, cache=cache,
    )  # fmt: skip


def _within(generation: Generation, rows: int, slots: Tensor, given: Any, past: Any, cache: Any) -> Forward:
    """A forward inside `generate`: of its main stream of tokens, or of the one that guidance runs beside it."""
    tokens, is_first = slots.shape[0], not generation.started
    mask = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
    if is_first:
        empty = generation.width is None and isinstance(past, int) and past == 0
        generation.begin(cache, past + tokens, _own(given, slots) if empty and mask is None else mask)
    assert generation.width is not None
    is_main, before = generation.is_main(cache), past
    if is_main:
        columns, width = generation.columns(rows, slots.device), generation.width
        if generation.guided:
            generation.end = past + tokens
        generation.processed += tokens
        before = generation.advance(past, tokens, is_first)
    else:
        width = past + tokens - (generation.end - generation.width)
        columns = None if mask is None else Columns.of(mask[:, :width])
    may_hold_prompt = not isinstance(before, int) or before < width
    ends_prompt = before + tokens >= width if isinstance(before, int) else tokens >= width or not is_first
    positions, valid = slots[None], None
    if columns is not None and may_hold_prompt:
        positions, valid = columns.at(slots)
    elif columns is not None:
        positions = columns.beyond(slots)
    if columns is not None:
        length = columns.length
    else:
        length = generation.whole_width(slots) if is_main else slots.new_full((1, 1), width)
    return Forward(
        rows=rows,
        tokens=tokens,
        texts=rows if generation.texts is None else generation.texts,
        slots=slots - generation.virtual if generation.virtual else slots,
        positions=positions,
        valid=valid,
        prompt_length=length,
        starts_prompt=isinstance(before, int) and before == 0,
        may_hold_prompt=may_hold_prompt and is_main,
        ends_prompt=ends_prompt and is_main,
        cache=cache,
        generation=generation,
    )


def _past(cache: Any, mask: Tensor | None, width: int, generation: Generation | None) -> Any:
    """How many slots stand before this forward's first: an int, a live tensor with a static cache, None if unknown."""
    if cache is None:
        return 0
    if knows_length(cache):
        length = length_of(cache)
        is_its_own = generation is not None and (generation.cache is None or generation.cache is cache)
        return generation.processed if generation is not None and is_its_own and is_none(length) else length
    if generation is not None:
        return generation.processed
    past = 0 if mask is None else mask.shape[1] - width
    return None if past == 0 and _holds_state(cache) else past


def _is_zero(past: Any) -> bool:
    """Whether nothing is cached. Compiled code cannot branch on a live tensor, and takes it for filled."""
    return past == 0 if isinstance(past, int) else not torch.compiler.is_compiling() and bool(past == 0)


def knows_length(cache: Any) -> bool:
    """Whether a cache counts its tokens; that of a state-space model does not."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return hasattr(cache, "get_seq_length")
    return not layers or any(hasattr(layer, "get_seq_length") for layer in layers)


def is_none(length: Any) -> bool:
    """Whether a cache counts nothing, as far as is known without asking the device."""
    return isinstance(length, int) and length == 0


def length_of(cache: Any) -> Any:
    """What a cache counts; where its first layer keeps a state and counts nothing, what another does."""
    length = cache.get_seq_length()
    if not is_none(length):
        return length
    counts = (layer.get_seq_length() for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
    return max((count for count in counts if isinstance(count, int)), default=0)


def _holds_state(cache: Any) -> bool:
    """Whether a cache that does not count its tokens holds any."""
    if isinstance(cache, list | tuple):
        return len(cache) > 0
    held = getattr(cache, "has_previous_state", False)
    return bool(held() if callable(held) else held)


# masks


def _one_mask(given: Any) -> Any:
    """Of masks for several kinds of attention, the one that hides least."""
    if not isinstance(given, Mapping):
        return given
    whole = given.get("full_attention")
    return next((mask for mask in given.values() if mask is not None), None) if whole is None else whole


def _own(given: Any, slots: Tensor) -> Tensor | None:
    """(rows, tokens), true where an attention mask lets a token see itself, which padding may not; None: it is no mask
    of (rows, 1, tokens, columns)."""
    if not isinstance(given, Tensor) or given.ndim not in (3, 4):
        return None
    square = given if given.ndim == 3 else given[:, 0]
    tokens = slots.shape[0]
    if square.shape[1] not in (1, tokens) or square.shape[2] < tokens:
        return None
    lines = torch.arange(tokens, device=slots.device) if square.shape[1] == tokens else torch.zeros_like(slots)
    own = square[:, lines, slots.clamp(max=square.shape[2] - 1)]
    return own > HIDDEN if own.is_floating_point() else own.bool()


def _shape_of(given: Any) -> str:
    return f"of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def _refuse_packed(inputs: Mapping[str, Any], given: Any, cache: Any, slots: Tensor) -> None:
    found = [name for name in PACKED if inputs.get(name) is not None]
    positions = inputs.get("position_ids")
    is_flat = isinstance(given, Tensor) and given.ndim == 2
    unmasked = not is_flat and cache is None and not torch.compiler.is_compiling()
    if unmasked and isinstance(positions, Tensor) and positions.ndim == 2:
        anew, own = positions.diff(dim=-1) != 1, _own(given, slots)
        if bool((anew if own is None else anew & own[:, 1:] & own[:, :-1]).any()):
            found.append("position_ids that start anew inside a row, without an attention_mask")
    if found:
        raise ValueError(
            f"got a packed or continuously batched call ({', '.join(found)}): its rows hold several texts, which no "
            "edit can tell apart. Give one text a row, padded, with its attention_mask"
        )
