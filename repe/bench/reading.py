"""What reading costs: extraction and its parts, a scan, and the memory of what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch.nn.functional import cosine_similarity

import repe
from repe.bench.table import Row
from repe.bench.timing import LEAST, Estimate, Run, in_turns
from repe.bench.workload import FACTS, Workload, contrast

PAIRS, BATCH = 128, 32
Pairs = Sequence[tuple[str, str]]


def rows(work: Workload, turns: int) -> Iterator[Row]:
    few = work.small
    pairs, large = work.pairs(16 if few else PAIRS), work.repe_pairs(64 if few else 512)
    yield extraction(work, pairs, turns, f"{len(pairs)} pairs")
    yield from parts(work, pairs, turns)
    yield from alone(work, work.unlike(32 if few else 2 * PAIRS), turns)
    yield extraction(work, large, LEAST, f"{len(large)} pairs made as RepE makes them")
    yield evaluations(work, flat(large))
    yield from scan(work, turns)
    yield kept(work)


def extraction(work: Workload, pairs: Pairs, turns: int, what: str) -> Row:
    """Against forwards of the whole model in batches as they come, with the hidden states of all blocks."""
    texts, chosen = flat(pairs), contrast(pairs)
    runs = (
        lambda: plain(work, texts),
        lambda: repe.extract(work.model, work.tokenizer, chosen, blocks=work.middle, enough=None, writes=False),
    )
    seconds = in_turns(runs, turns, work.device)
    took = dict(zip(("plain forwards", "extract"), seconds.T, strict=True))
    return Row(
        f"extract, {what}: times faster than plain forwards", Estimate.of(took["plain forwards"] / took["extract"]),
        "", f"{medians(took, *took)}; {agreement(work, texts)}",
    )  # fmt: skip


def parts(work: Workload, pairs: Pairs, turns: int) -> Iterator[Row]:
    """The same factor, part by part."""
    texts, model, tokenizer = flat(pairs), work.model, work.tokenizer
    steps: tuple[tuple[str, Run], ...] = (
        ("", lambda: plain(work, texts)),
        ("no head, no states kept, short rows first", lambda: repe.capture(model, tokenizer, texts, packed=False)),
        ("early stop", lambda: repe.capture(model, tokenizer, texts, packed=False, blocks=work.middle)),
        ("what texts begin with alike run once", lambda: repe.capture(model, tokenizer, texts, blocks=work.middle)),
    )
    seconds = in_turns([run for _, run in steps], turns, work.device)
    for (before, after), (why, _) in zip(pairwise(seconds.T), steps[1:], strict=True):
        yield Row(f"    of which {why}", Estimate.of(before / after))
    yield evaluations(work, texts)


def alone(work: Workload, texts: Sequence[str], turns: int) -> Iterator[Row]:
    """Texts that share nothing, where only the early stop and the head are to be saved."""
    seconds = in_turns(
        [lambda: plain(work, texts), lambda: repe.capture(work.model, work.tokenizer, texts, blocks=work.middle)],
        turns, work.device,
    )  # fmt: skip
    yield Row(
        f"capture, {len(texts)} texts that share nothing: times faster than plain forwards",
        Estimate.of(seconds[:, 0] / seconds[:, 1]), ">= 1.3",
        medians(dict(zip(("plain forwards", "capture"), seconds.T, strict=True)), "plain forwards", "capture"),
    )  # fmt: skip


def scan(work: Workload, turns: int) -> Iterator[Row]:
    """All tokens of a text at all blocks, against one forward of the model without its head."""
    text = f"{work.prompts(1)[0]} {FACTS[3]}. {FACTS[9]}"
    vector = repe.extract(work.model, work.tokenizer, contrast(work.pairs(16)), writes=False)
    batch = work.tokenizer(text, return_tensors="pt").to(work.device)

    @torch.inference_mode()
    def forward() -> None:
        work.model.model(input_ids=batch.input_ids, use_cache=False)

    seconds = in_turns([lambda: repe.read(work.model, work.tokenizer, text, vector), forward], 10 * turns, work.device)
    yield Row(
        f"read, {batch.input_ids.shape[1]} tokens x {len(vector.blocks)} blocks: the cost of one plain forward",
        Estimate.of(seconds[:, 0] / seconds[:, 1]), "<= 1.2",
        medians(dict(zip(("read", "forward"), seconds.T, strict=True)), "read", "forward"),
    )  # fmt: skip


def flat(pairs: Pairs) -> list[str]:
    return [text for pair in pairs for text in pair]


@torch.inference_mode()
def plain(work: Workload, texts: Sequence[str]) -> None:
    for start in range(0, len(texts), BATCH):
        batch = work.tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True).to(work.device)
        work.looked_into(**batch, output_hidden_states=True, use_cache=False)


def medians(took: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {1000 * float(sorted(took[name])[len(took[name]) // 2]):.4g} ms" for name in names)


def agreement(work: Workload, texts: Sequence[str]) -> str:
    """How alike what is captured is to what a plain forward of each text alone has in its hidden states."""
    chosen = list(texts[:: max(1, len(texts) // 32)])
    # those of the last block have gone through the final norm
    blocks = [block for block in work.middle if block + 1 < work.model.config.num_hidden_layers]
    captured = repe.capture(work.model, work.tokenizer, texts, blocks=blocks)[:: max(1, len(texts) // 32)]
    with torch.inference_mode():
        states = [
            work.looked_into(**work.tokenizer(text, return_tensors="pt").to(work.device), output_hidden_states=True)
            for text in chosen
        ]
    expected = torch.stack([torch.stack([s.hidden_states[b + 1][0, -1] for b in blocks]) for s in states]).cpu()
    return f"least cosine with the plain path {cosine_similarity(captured, expected, dim=-1).min():.7f}"


def evaluations(work: Workload, texts: Sequence[str]) -> Row:
    """Tokens times blocks that are run, filler and the texts run alone for a check included, against those of one
    forward a text."""
    tokens = sum(len(work.tokenizer(text).input_ids) for text in texts)
    blocks = work.model.config.num_hidden_layers
    with watching(work.model) as outputs:
        repe.capture(work.model, work.tokenizer, texts, blocks=work.middle)
    return Row(
        "    token-block evaluations: times fewer than of one forward a text",
        Estimate.exact(tokens * blocks / sum(outputs.tokens)), ">= 10" if len(texts) == 1024 else "",
        f"{tokens * blocks} and {sum(outputs.tokens)}",
    )  # fmt: skip


class Outputs(NamedTuple):
    """Of every run of a block its tokens; of every forward how many numbers of what blocks put out were alive then."""

    tokens: list[int]
    alive: list[int]


@contextmanager
def watching(model: Any) -> Iterator[Outputs]:
    """Looks at what every block puts out, while the context lasts."""
    seen, held = Outputs([], []), WeakSet()  # type: ignore[var-annotated]

    def look(out: Any) -> None:
        seen.tokens.append(out.shape[0] * out.shape[1])
        held.add(out)
        seen.alive.append(sum(tensor.numel() for tensor in held))

    blocks = model.model.layers
    for block in blocks:
        block.forward = noted(block.forward, look)  # a hook would keep texts out of trees
    try:
        yield seen
    finally:
        for block in blocks:
            del block.forward


def noted(forward: Any, look: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        look(out)
        return out

    return run


def kept(work: Workload) -> Row:
    """The most that is alive of what blocks put out during a last-token capture, and what is kept at its end."""
    texts = work.unlike(64)
    with watching(work.model) as outputs:
        activations = repe.capture(work.model, work.tokenizer, texts, batch_size=8)
    width, blocks = work.model.config.hidden_size, work.model.config.num_hidden_layers
    most = Estimate.exact(max(outputs.alive) / (max(outputs.tokens) * width))
    numbers = activations.untyped_storage().nbytes() // 4
    note = f"of {blocks}; kept: {numbers} numbers = {len(texts)} texts x {blocks} blocks x {width}"
    return Row("memory of a last-token capture: most outputs of blocks alive at once", most, "<= 2", note)
