"""Writing: how happy the texts are that are written along happiness, how likely without it, and what they are like."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from repe import display
from repe.display import Table
from repe.measuring import write
from repe.measuring.judges import sentiment
from repe.real.bench import Bench, Row, kept, table
from repe.real.prompts import PROMPTS

CONCEPT = "happiness"
ALPHAS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NEW_TOKENS = 60
SAMPLES, LETTERS, WIDTH = 5, 240, 120


def tables(bench: Bench) -> Iterator[Table | str]:
    rows = {alpha: bench.row("writing", CONCEPT, partial(row, bench, alpha), alpha) for alpha in ALPHAS}
    count = bench.at_most(len(PROMPTS))
    title = f"{CONCEPT} on {bench.name}, written after {count} prompts: means; perplexity is the unsteered model's"
    yield table(title, "alpha", {f"{alpha:g}": row for alpha, row in rows.items()})
    for number, prompt in enumerate(PROMPTS[:: count // SAMPLES][:SAMPLES]):
        texts = [(f"{alpha:g}", row["texts"][number]) for alpha, row in rows.items()]
        yield display.table(prompt, ["alpha", "text"], texts).text(WIDTH)


def row(bench: Bench, alpha: float) -> Row:
    count = bench.at_most(len(PROMPTS))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:count]]
    written = write(
        bench.model, bench.tokenizer, bench.vector(CONCEPT), chats, [alpha], judge=sentiment,
        max_new_tokens=bench.at_most(NEW_TOKENS), resume=bench.folder / f"{bench.name}-writing-texts.jsonl",
    )  # fmt: skip
    at = written.alphas.tolist().index(alpha)
    measured = {name: kept(written.estimates(name)[at]) for name in ("sentiment", "perplexity", "repetition")}
    texts = written.texts[at][:: count // SAMPLES][:SAMPLES]
    return measured | {"texts": [" ".join(text.split())[:LETTERS] for text in texts]}
