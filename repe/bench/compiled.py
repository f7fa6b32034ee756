"""What steering costs in compiled code, which on a GPU is recorded as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters

import repe
from repe.bench.steering import BATCHES, encoded, milliseconds
from repe.bench.table import Row
from repe.bench.timing import Estimate, in_turns
from repe.bench.workload import Workload, twin

CHANGES = 100


def rows(work: Workload, steps: int) -> Iterator[Row]:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield from _rows(work, steps)


def _rows(work: Workload, steps: int) -> Iterator[Row]:
    plain, steered = twin(work.model), twin(work.model)
    torch._dynamo.reset()
    with repe.steer(steered, work.vector, 1.0, blocks=work.middle, unit="gap") as handle:
        forwards = [compiled(model, work) for model in (plain, steered)]
        for batch in BATCHES[: 1 if work.small else None]:
            runs = [StaticStep(work, m, batch, f) for m, f in zip((plain, steered), forwards, strict=True)]
            seconds = in_turns(runs, steps, work.device, warm=5)
            yield Row(
                f"decode step, {batch} rows, compiled and steered: of compiled and unsteered",
                Estimate.of(seconds[:, 1] / seconds[:, 0]), "<= 1.01" if work.device != "cpu" else "",
                milliseconds(seconds),
            )  # fmt: skip
        yield changes(handle, runs[1])
    torch._dynamo.reset()


def compiled(model: Any, work: Workload) -> Callable[..., Any]:
    """With the default compiler; a toy needs no C++ compiler."""
    if work.small:
        return torch.compile(model.forward, backend="eager", dynamic=False)
    mode = "reduce-overhead" if work.device.startswith("cuda") else None
    return torch.compile(model.forward, mode=mode, dynamic=False)


def changes(handle: repe.Steering, step: StaticStep) -> Row:
    """Counts what a hundred new alphas compile, and that each of them was heard."""
    step()
    counters.clear()
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cache keeps the keys and values of the first alpha
        for change in range(CHANGES):
            handle.alpha = 0.01 * change
            seen.add(float(step().float().sum()))
    anew = counters["stats"]["unique_graphs"] + sum(counters["graph_break"].values())
    unheard = CHANGES - len(seen)
    return Row(
        f"alpha changed {CHANGES} times: recompilations, graph breaks and changes not heard",
        Estimate.exact(anew + unheard), "<= 0", f"{len(seen)} different outputs",
    )  # fmt: skip


class StaticStep:
    """One token more on a static cache, whose shapes never change; afterwards it is forgotten."""

    def __init__(self, work: Workload, model: Any, batch: int, forward: Callable[..., Any]) -> None:
        from transformers import StaticCache

        self.forward, inputs = forward, encoded(work, batch)
        width = inputs["input_ids"].shape[1]
        self.cache: Any = StaticCache(config=model.config, max_cache_len=width + 8)
        with torch.inference_mode():
            first = model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.token = first.logits.argmax(-1)
        self.positions = torch.full_like(self.token, width)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        logits = self.forward(
            input_ids=self.token, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).logits
        torch._foreach_sub_([layer.cumulative_length for layer in self.cache.layers], 1)
        return logits
