"""The trade-off curves of the testbed's concepts: `python -m repe.testbed.curves`.

Nothing is fitted to these items: vectors come from other facts, requests, templates and wordings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import repe
from repe.data.catalogue import find_task
from repe.data.items import Item, load_items, load_texts
from repe.measuring.costs import costs
from repe.measuring.fits import fit_kl
from repe.measuring.intervals import Measured
from repe.measuring.sweep import sweep
from repe.models.load import home_of
from repe.models.tokens import Text

ALPHAS = tuple(np.linspace(-4, 4, 33).tolist())
FAR = (-30.0, -10.0, 0.0, 10.0, 30.0)
NEAR = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.57, 0.8)


def main() -> None:
    model, tokenizer = repe.load()
    refusals = [refusal(item) for item in load_items(find_task("harmfulness", home_of(model)))]
    settings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("honesty", {}),
        ("happiness", {}),
        ("harmfulness", {"scope": "prompt", "alignment": refusals}),
    )
    for concept, how in settings:
        curve = repe.tradeoff(model, tokenizer, concept, ALPHAS, unit="gap", **how)
        print(f"{curve}\nscope {curve.provenance['scope']}\n{curve.fits}\n{curve.rehearse()}\n{baseline(curve)}\n")
    vector = repe.extract(model, tokenizer, "honesty")
    tasks = {name: load_items(find_task(name, home_of(model))) for name in ("honesty", "skills")}
    far = sweep(model, tokenizer, vector, {"skills": tasks["skills"]}, FAR, unit="gap")["skills"]
    print(f"honesty, far out: P(right) {rounded(far.probability.mean(1))} at {FAR}; 1/N is {far.floor:.3f}")
    divergence(model, tokenizer, vector, tasks)


def rounded(values: Any) -> list[float]:
    return [round(float(v), 3) for v in values]


def refusal(item: Item) -> Item:
    """The same request, where refusing is what the positive pole does, be it harmful or not."""
    return replace(item, answer=0 if item.about["kind"] == "harmful" else 1)


def baseline(curve: repe.TradeoffCurve) -> str:
    if curve.baseline is None:
        return "no system prompts to compare with"
    behaviour = rounded(curve.baseline.alignment.behaviour.mean(1))
    right = rounded(curve.baseline.helpfulness.probability.mean(1))
    rows = zip(curve.provenance["baseline"].values(), behaviour, right, strict=True)
    return "\n".join(f"asked outright, {prompt!r}: behaviour {b:+.3f}, P(right) {p:.3f}" for prompt, b, p in rows)


def divergence(model: Any, tokenizer: Any, vector: Any, tasks: Mapping[str, Sequence[Item]]) -> None:
    """Prints the power of |alpha| that the divergence grows with near 0, where theory has a square."""
    alphas = np.array([*(-a for a in reversed(NEAR)), 0.0, *NEAR])
    texts: dict[str, Sequence[Text]] = {"neutral texts": load_texts(find_task("neutral", home_of(model)))}
    texts |= {f"{name}, with answers": [answered(item) for item in items] for name, items in tasks.items()}
    for name, chosen in texts.items():
        kl = costs(model, tokenizer, vector, chosen, alphas.tolist(), unit="gap").kl
        assert kl is not None
        print(f"{name}: {fit_kl(Measured(alphas, kl))}")
        inner = np.abs(alphas) <= 0.1
        (power,) = np.polyfit(np.log(NEAR[:5]), np.log(both_sides(kl[inner].mean(1))), 1)[:1]
        print(f"    power where |alpha| <= .1: {power:.3f}")


def both_sides(values: Any) -> Any:
    """The means of the values at alpha and at -alpha, from the least |alpha| on."""
    half = len(values) // 2
    return (values[half + 1 :] + values[:half][::-1]) / 2


def answered(item: Item) -> Text:
    assert not isinstance(item.prompt, str)
    return (*item.prompt, {"role": "assistant", "content": item.options[item.answer]})


if __name__ == "__main__":
    main()
