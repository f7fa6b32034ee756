"""The door: from a concept's name, or vectors, and the options of an edit to a live handle on a model.

Names become vectors here and nowhere deeper.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from repe import ops
from repe.models.blocks import find_stack, is_encoder_decoder
from repe.reading.store import resolve, warn_if_foreign
from repe.reading.vector import ConceptVector
from repe.steering.edit import Concepts, Edit, EditOptions, spells_options
from repe.steering.gate import Gate
from repe.steering.handle import Steering, status
from repe.steering.scope import Alpha

Steered = str | Sequence[str | ConceptVector] | Concepts | Edit
"""What is steered along: a concept's name, a vector, several of them, bare constants, or a whole edit."""


@spells_options
def steer(
    model: nn.Module,
    concept: Steered,
    alpha: Alpha = 1.0,
    *,
    tokenizer: Any = None,
    blocks_at: str | None = None,
    prompt_length: int | Tensor | None = None,
    impl: str = "auto",
    only_here: bool = False,
    **options: Unpack[EditOptions],
) -> Steering:
    """Steer a model along a concept, from now until the handle is removed or its `with` block ends.

    Args:
        model: any transformers model that `repe.models.find_stack` understands; it is not copied.
        concept: a name (shipped for this model, else cached, else extracted once, which needs `tokenizer`), a vector,
            several (for edits in a subspace or a plane), the bare constants of the edit formula, or a whole `Edit`.
        alpha: the strength, a number or one for every row of the batch; 0 is off for every edit. 1 costs 0.1 nats a
            token on plain text, at which a concept is plain; the cost is quadratic, and the gain linear.
        tokenizer: of the model, for a name whose vector has to be extracted.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        prompt_length: the prompts' tokens, padding left out, for forwards outside `generate` on a filled cache.
        impl: the implementation of the formula: see `repe.ops.pick`.
        only_here: act on the forwards of this thread alone, where several use the model at once; code that was compiled
            is edited in all. Without it a handle acts on whatever the model is used for, as in the thread that
            `generate` runs in while a streamer is read.
        edit: the kind of edit, one of `repe.steering.KINDS`.
        blocks: "auto" (those that the vector recommends; of several that are added, each at its own), "all", a number,
            or several.
        scope: the tokens: "all", "prompt", "generated", "answer" (the last prompt token and all after it), a slice or
            list of positions, or a boolean mask (rows, tokens). Padding is never edited, nor are virtual tokens that an
            adapter puts before the prompt of `generate`.
        unit: of alpha, for edits that have a length: what 1 adds along the direction. "kl", the dose: what makes plain
            text diverge by 0.1 nats a token; "gap", from the middle between the poles to the positive pole; "sigma",
            one standard deviation inside the poles; "norm", the mean norm of the activations: all shared out over the
            blocks. In doses, several blocks are pushed by as many gaps each as cost one dose together while costs are
            quadratic; `repe.reading.dosed(model, tokenizer, vector.at(13, 14))` measures it. "raw", a length of 1 at
            every block; it alone is taken at a site that is not the vector's own, where the others were not measured.
        target: the score that an edit aims at, where it takes one; the poles stand at -1 and +1.
        theta: the angle in radians, where an edit takes one.
        gate: which rows are edited: a `Gate`, or a function of the prompts' activations at the first edited block,
            (mean, last), both (rows, d_model), to a boolean (rows,).
        keep_norm: give every edited activation back its norm.
        site: "block", "attention", "mlp" or "embedding"; the vector's own by default.
        stack: "decoder" or "encoder"; the vector's own by default.

    Warns:
        UserWarning: the same is attached already, as when a cell of a notebook is run again: strengths add up.
        NotWrittenWarning: with scope "all", the concept's behaviour items move no further than along random directions.
        StrengthWarning: the strength is expected to cost less than 0.0005 nats a token, or more than 0.5.

    Returns:
        The handle, which is also a context manager. Several handles apply in the order they were attached.

    Raises:
        ValueError, TypeError, IndexError: an argument cannot be meant; the model stays as it was.
        RuntimeError: another thread steers the model, and each would act in both: pass `only_here`.

    Example:
        >>> question = [{"role": "user", "content": "Name the trade of Abrin Tolva."}]
        >>> with repe.steer(model, "honesty", -1.0) as handle:
        ...     answers = repe.generate(model, tokenizer, [question], max_new_tokens=8)
        >>> handle.attached
        False

    Sources: Zou et al. (arXiv 2310.01405) for reading-vector control; Rimsky et al. (arXiv 2312.06681) for the mean
    difference; Wolf et al. (arXiv 2401.16332) for the meaning of alpha.
    """
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    stack = find_stack(model, edit.stack, blocks_at)
    handle = Steering(model, stack, edit, ops.pick(impl))
    for vector in (*edit.vectors, *([edit.gate.vector] if isinstance(edit.gate, Gate) else [])):
        warn_if_foreign(model, vector)
    handle.prompt_length, handle.alpha = prompt_length, alpha
    handle._thread = threading.get_ident() if only_here else None
    _mind_others(handle, status(model))
    handle._weigh_from_now_on()
    runs_before_generation = edit.stack == "encoder" and is_encoder_decoder(model)
    handle._attach(watch_generate=not runs_before_generation)
    return handle


def _mind_others(handle: Steering, others: Sequence[Steering]) -> None:
    """Warns where the same is attached already. Raises RuntimeError where a handle of another thread would act in this
    one too, and this one in the other."""
    running = {thread.ident: thread.name for thread in threading.enumerate()}
    for other in others:
        is_elsewhere = other._made_in != handle._made_in and other._made_in in running
        if is_elsewhere and other._thread is None and handle._thread is None:
            raise RuntimeError(
                f"the thread {running[other._made_in]!r} attached {other!r} and goes on, and each would act in both: "
                "pass only_here=True in every thread, or end the other first"
            )
    same = sum(other.edit == handle.edit and other._thread == handle._thread for other in others)
    if same:
        warnings.warn(
            f"{same} handle{'s' * (same > 1)} like {handle!r} act{'s' * (same == 1)} on this model already, and their "
            "strengths add up: end them first (`repe.detach(model)` ends all that `repe.status(model)` lists), or set "
            "`handle.alpha`",
            UserWarning,
            stacklevel=3,
        )


def edit_of(
    model: nn.Module,
    concept: Steered,
    tokenizer: Any = None,
    *,
    blocks_at: str | None = None,
    **options: Unpack[EditOptions],
) -> Edit:
    """The edit that `steer` attaches for these arguments; see there. Nothing is attached.

    Raises:
        ValueError, TypeError: as `steer` raises them.
    """

    def vector_of(concept: Any) -> Any:
        return resolve(model, concept, tokenizer, blocks_at=blocks_at) if isinstance(concept, str) else concept

    if isinstance(concept, Sequence) and not isinstance(concept, str):
        return Edit.of([vector_of(each) for each in concept], **options)
    return Edit.of(vector_of(concept), **options)
