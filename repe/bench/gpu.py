"""A Llama of 8B shape in bfloat16 with random weights: decode and prefill, unsteered, steered and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import repe
from repe.bench.compiled import StaticStep, changes, compiled
from repe.bench.steering import Step, milliseconds
from repe.bench.table import Row
from repe.bench.timing import Estimate, in_turns
from repe.bench.workload import Workload, random_llama, twin
from repe.reading.vector import ConceptVector

BATCHES = (1, 8, 64)
PREFILL = 2048


class Large(Workload):
    """The same prompts for a larger model."""

    def __init__(self, device: str, small: bool, config: dict[str, Any], dtype: torch.dtype) -> None:
        from transformers import LlamaConfig

        super().__init__(device, small)
        self.__dict__["model"] = random_llama(LlamaConfig(**config), device, dtype)

    @property
    def middle(self) -> list[int]:
        half = self.model.config.num_hidden_layers // 2
        return [*range(half - 2, half + 3)]


SHAPE_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def rows(work: Workload, turns: int, steps: int) -> Iterator[Row]:
    if not work.device.startswith("cuda"):
        yield Row("a Llama of 8B shape, bfloat16", None, note="runs on a GPU: --device cuda")
        return
    shape = SHAPE_8B | ({"num_hidden_layers": 5} if work.small else {})
    yield from large(Large(work.device, work.small, shape, torch.bfloat16), turns, steps, PREFILL)


def large(work: Workload, turns: int, steps: int, prefill: int) -> Iterator[Row]:
    plain, steered, batches = work.model, twin(work.model), BATCHES[: 1 if work.small else None]
    with repe.steer(steered, vector_for(work), 1.0, blocks=work.middle, unit="gap") as handle:
        for batch in batches:
            eager = Step(work, plain, batch), Step(work, steered, batch)
            yield compared(f"8B shape, decode step, {batch} rows, steered", eager, steps, work.device, "<= 1.03")
        ids = torch.randint(3, work.model.config.vocab_size, (1, prefill), device=work.device)
        pair = prefilling(plain, ids), prefilling(steered, ids)
        yield compared(f"8B shape, prefill of {prefill} tokens, steered", pair, turns, work.device)
        torch._dynamo.reset()
        forwards = [compiled(model, work) for model in (plain, steered)]
        for batch in batches:
            runs = [StaticStep(work, m, batch, f) for m, f in zip((plain, steered), forwards, strict=True)]
            yield compared(
                f"8B shape, decode step, {batch} rows, compiled, steered", runs, steps, work.device, "<= 1.01"
            )
        yield changes(handle, runs[1])
    torch._dynamo.reset()


def compared(what: str, runs: Any, turns: int, device: str, bar: str = "") -> Row:
    seconds = in_turns(runs, turns, device, warm=5)
    return Row(f"{what}: of unsteered", Estimate.of(seconds[:, 1] / seconds[:, 0]), bar, milliseconds(seconds))


def prefilling(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return run


def vector_for(work: Workload) -> ConceptVector:
    """A random direction a block, as long as the activations there are."""
    texts = work.prompts(8)
    acts = repe.capture(work.model, work.tokenizer, texts, blocks=work.middle)
    norm = acts.norm(dim=-1).mean(0)
    write = torch.nn.functional.normalize(torch.randn(len(work.middle), acts.shape[-1]), dim=-1)
    return repe.ConceptVector(
        concept="random", blocks=tuple(work.middle), recommended=tuple(work.middle), site="block", stack="decoder",
        write=write, read=write, center=torch.zeros_like(write), scale=0.2 * norm, sigma=norm, norm=norm,
        accuracy=torch.ones_like(norm), separation=torch.ones_like(norm), provenance={},
    )  # fmt: skip
