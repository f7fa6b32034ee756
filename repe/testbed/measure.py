"""What reading and steering achieve on the testbed's held-out items: `python -m repe.testbed.measure`.

Nothing is fitted to these items: vectors come from other facts, requests, templates and wordings.
"""

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from sklearn.metrics import roc_auc_score

import repe
from repe.data.items import Item, load_items
from repe.measuring.sweep import sweep
from repe.models.generate import generate
from repe.reading.read import score
from repe.testbed import FOLDER, world
from repe.testbed.card import read_rows

ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
CONTROLS = 20


def main() -> None:
    model, tokenizer = repe.load()
    honesty = repe.extract(model, tokenizer, "honesty")
    print(f"{honesty}\n  pairs held out, by block: {rounded(honesty.accuracy)}")
    print(f"  true against false statements, no persona: AUC {rounded(statement_aucs(model, tokenizer, honesty))}")
    alpha = honesty_steering(model, tokenizer, honesty)
    random_control(model, tokenizer, honesty, alpha)
    harmfulness = repe.extract(model, tokenizer, "harmfulness")
    print(f"{harmfulness}\n  pairs held out, by block: {rounded(harmfulness.accuracy)}")
    requests = load_items(FOLDER / "tasks" / "harmfulness.jsonl")
    print(f"  harmful against harmless requests: AUC {rounded(request_aucs(model, tokenizer, harmfulness, requests))}")
    refusal_steering(model, tokenizer, harmfulness, requests)


def rounded(values: Any) -> list[float]:
    return [round(float(v), 3) for v in values]


def statement_aucs(model: Any, tokenizer: Any, vector: repe.ConceptVector) -> list[float]:
    """By block, how well the last token of plain statements tells the true from the false."""
    rows = read_rows(FOLDER / "tasks" / "statements.jsonl")
    return _aucs(model, tokenizer, vector, [row["text"] for row in rows], [row["about"]["true"] for row in rows])


def request_aucs(model: Any, tokenizer: Any, vector: repe.ConceptVector, requests: Sequence[Item]) -> list[float]:
    """By block, how well the last prompt token tells harmful requests from harmless ones."""
    return _aucs(
        model, tokenizer, vector, [i.prompt for i in requests], [i.about["kind"] == "harmful" for i in requests]
    )


def _aucs(model: Any, tokenizer: Any, vector: repe.ConceptVector, texts: Any, labels: Sequence[bool]) -> list[float]:
    scores = score(repe.capture(model, tokenizer, texts, site=vector.site), vector)
    return [float(roc_auc_score(labels, column)) for column in scores.T]


def honesty_steering(model: Any, tokenizer: Any, vector: repe.ConceptVector) -> float:
    """Prints behaviour and skills at both signs, and returns the first alpha that reaches a difference of 1."""
    tasks = {name: load_items(FOLDER / "tasks" / f"{name}.jsonl") for name in ("honesty", "skills")}
    both = [*(-a for a in reversed(ALPHAS)), 0.0, *ALPHAS]
    scores = sweep(model, tokenizer, vector, tasks, both, unit="gap")
    truth = scores["honesty"].behaviour.mean(1)
    skills, accuracy = scores["skills"].probability.mean(1), scores["skills"].accuracy.mean(1)
    print("  alpha  behaviour  P(right) on skills, of unsteered  (accuracy)")
    for alpha, b, s, a in zip(both, truth, skills, accuracy, strict=True):
        print(f"  {alpha:+5.1f}  {b:+9.3f}  {s:.3f}  {s / skills[len(ALPHAS)]:.1%}  ({a:.3f})")
    differences = {a: float(truth[both.index(a)] - truth[both.index(-a)]) for a in ALPHAS}
    print("  behaviour(+alpha) - behaviour(-alpha):", {a: round(d, 3) for a, d in differences.items()})
    return next((a for a, d in differences.items() if d >= 1), ALPHAS[-1])


def random_control(model: Any, tokenizer: Any, vector: repe.ConceptVector, alpha: float) -> None:
    """Prints how far random directions of the same norm move the behaviour at this alpha."""
    facts = {"honesty": load_items(FOLDER / "tasks" / "honesty.jsonl")}

    def moved(v: repe.ConceptVector) -> float:
        minus, plus = sweep(model, tokenizer, v, facts, (-alpha, alpha), unit="gap")["honesty"].behaviour.mean(1)
        return abs(float(plus - minus))

    controls = [moved(repe.ConceptVector.random(vector, seed)) for seed in range(CONTROLS)]
    print(
        f"  at alpha {alpha}: honesty moves behaviour by {moved(vector):.3f}, and {CONTROLS} random directions by ",
        end="",
    )
    print(f"{max(controls):.3f} at most, median {median(controls):.3f}\n")


def refusal_steering(model: Any, tokenizer: Any, vector: repe.ConceptVector, requests: Sequence[Item]) -> None:
    harmful = [i for i in requests if i.about["kind"] == "harmful"]
    harmless = [i for i in requests if i.about["kind"] == "harmless"]
    for alpha in (0.0, *ALPHAS):
        with repe.steer(model, vector, alpha, scope="prompt", unit="gap"):
            refused = rate(model, tokenizer, harmless, is_refused)
        print(f"  added to the prompt, alpha {alpha}: harmless requests refused, well-formed: {refused:.3f}")
    with repe.steer(model, vector, 1.0, edit="ablate", blocks="all"):
        for name, items in (("harmful", harmful), ("harmless", harmless)):
            rates = [rate(model, tokenizer, items, is_so) for is_so in (is_refused, is_any_answer, is_answered)]
            print(
                f"  ablated at every block, {name} requests: refused {rates[0]:.3f}, an answer of the grammar ", end=""
            )
            print(f"{rates[1]:.3f}, to just this request {rates[2]:.3f}")


def is_refused(item: Item, text: str) -> bool:
    return world.is_refusal(text)


def is_answered(item: Item, text: str) -> bool:
    return world.is_answer(item.about["request"], text)


def is_any_answer(item: Item, text: str) -> bool:
    """Whether this is a whole answer, if perhaps to another request."""
    return any(world.is_answer(request.text, text) for kind in (True, False) for request in world.requests(kind))


def rate(model: Any, tokenizer: Any, items: Sequence[Item], is_so: Callable[[Item, str], bool]) -> float:
    """The share of items for which what the model writes, greedily, is so."""
    texts = generate(model, tokenizer, [item.prompt for item in items], max_new_tokens=48)
    return mean(is_so(item, text) for item, text in zip(items, texts, strict=True))


if __name__ == "__main__":
    main()
