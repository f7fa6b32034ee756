"""What steering costs: a decode step, a generation, a hook; and baked."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import repe
from repe.bench.table import Row
from repe.bench.timing import Estimate, Run, in_turns
from repe.bench.workload import Workload, twin

NEW, BATCHES = 48, (1, 8, 64)


def rows(work: Workload, turns: int, steps: int) -> Iterator[Row]:
    plain, steered = work.model, twin(work.model)
    handle = repe.steer(steered, work.vector, 1.0, blocks=work.middle, unit="gap")
    yield from decode(work, plain, steered, steps, len(work.middle))
    for batch in BATCHES[: 1 if work.small else None]:
        yield generation(work, plain, steered, batch, turns)
    handle.remove()
    yield cost("decode step, nothing attached: of unsteered, the floor of this clock", work, plain, steered, steps)
    with bare_hooks(steered, work):
        yield cost("decode step, bare hooks that return x + v, at as many: of unsteered", work, plain, steered, steps)
    with repe.steer(steered, work.vector, 1.0, blocks=work.middle, edit="ablate"):
        yield cost("decode step, ablated there: of unsteered", work, plain, steered, steps)
    baked = repe.bake(steered, work.vector, 1.0, blocks=work.middle, unit="gap")
    yield cost("decode step, baked: of unsteered", work, plain, steered, steps)
    baked.undo()


def decode(work: Workload, plain: Any, steered: Any, steps: int, hooks: int) -> Iterator[Row]:
    """Single decode steps in turns, on a cache that is put back after each."""
    seconds = in_turns([Step(work, plain), Step(work, steered)], steps, work.device, warm=5)
    yield Row(
        f"decode step, steered at {hooks} of {plain.config.num_hidden_layers} blocks: of unsteered",
        Estimate.of(seconds[:, 1] / seconds[:, 0]), "<= 1.02", milliseconds(seconds),
    )  # fmt: skip
    yield Row("    a hook", Estimate.of((seconds[:, 1] - seconds[:, 0]) * 1e6 / hooks), unit=" us")


@contextmanager
def bare_hooks(model: Any, work: Workload) -> Iterator[None]:
    """The least that hooks in Python cost."""
    added = work.vector.write[0].to(work.device)
    hooks = [model.model.layers[b].register_forward_hook(lambda m, a, out: out + added) for b in work.middle]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cost(what: str, work: Workload, plain: Any, other: Any, steps: int) -> Row:
    seconds = in_turns([Step(work, plain), Step(work, other)], steps, work.device, warm=5)
    return Row(what, Estimate.of(seconds[:, 1] / seconds[:, 0]), note=milliseconds(seconds))


def milliseconds(seconds: Any) -> str:
    unsteered, steered = (1000 * statistics.median(column) for column in seconds.T)
    return f"{unsteered:.4g} and {steered:.4g} ms, {len(seconds)} turns"


class Step:
    """One token more behind prompts that are cached; afterwards it is forgotten."""

    def __init__(self, work: Workload, model: Any, batch: int = 1) -> None:
        self.model = model
        with torch.inference_mode():
            first = model(**encoded(work, batch), use_cache=True, logits_to_keep=1)
        self.cache, self.token = first.past_key_values, first.logits.argmax(-1)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


def encoded(work: Workload, batch: int) -> Any:
    """Prompts of one length, so that nothing is padding."""
    return work.tokenizer([work.prompts(1)[0]] * batch, return_tensors="pt").to(work.device)


def generation(work: Workload, plain: Any, steered: Any, batch: int, turns: int) -> Row:
    inputs = work.tokenizer(work.prompts(batch), return_tensors="pt", padding=True).to(work.device)
    new = 4 if work.small else NEW

    def writing(model: Any) -> Run:
        return lambda: model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    seconds = in_turns([writing(plain), writing(steered)], turns, work.device)
    return Row(
        f"generate {new} tokens, {batch} rows: steered, of unsteered",
        Estimate.of(seconds[:, 1] / seconds[:, 0]), note=milliseconds(seconds),
    )  # fmt: skip
