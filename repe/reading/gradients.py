"""Gradients: what a small push at every block would do to answers and to plain text, without one being made.

A backward pass gives, for every block and every direction `v` at once, how fast the log odds of an answer change when
`v` is added at all edited tokens: `slope = g . v`. It gives the cost likewise. The divergence of the next token from
the unsteered model is quadratic, `KL = (alpha^2 / 2) F`, and its Fisher information `F` is the variance of the logits'
change under the model's own probabilities, summed over the tokens. A random vector of logits with just that covariance,
sent backwards, is a sample `s` with `E[(s . v)^2] = F`. Efficiency, `slope / sqrt(F)`, has no unit: it compares blocks,
readers, models and random directions.

What it does not know: what a large push does. Early blocks leave the quadratic soonest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.display import bar_of
from repe.models.blocks import device_of, hidden_of, with_hidden
from repe.models.finite import check_finite
from repe.models.logits import log_odds, log_probabilities, log_probability, logits_at, vocabulary_of
from repe.models.tokens import pad
from repe.models.tracking import Hook, prompts_end, put
from repe.reading.capture import evaluating

BATCH_TOKENS = 1024
MOST_LOGITS = 2**26  # numbers of logits that are held at once
RANDOM = 1000

Question = tuple[Sequence[Answer], int]
"""Options behind one prompt, and which of them is the right (or the aligned) one."""
Edited = Callable[[Answer], Tensor]
"""(tokens,) of an answer but for its last, boolean: which of them are edited."""


def everywhere(answer: Answer) -> Tensor:
    """Every token is edited."""
    return torch.ones(len(answer.ids) - 1, dtype=torch.bool)


def gradients_of_answers(
    model: nn.Module,
    sites: Sequence[nn.Module],
    questions: Sequence[Question],
    *,
    edited: Edited = everywhere,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> Tensor:
    """The gradient of every question's log odds of the right option against the others, summed over edited tokens.

    Args:
        model: causal, and not changed.
        sites: the modules whose outputs would be pushed.

    Returns:
        (questions, sites, d_model), float32, in nats for a push of length 1.

    Raises:
        NotDifferentiableError: the model has no gradient.
        OverflowError: its logits are not finite.
    """
    found = torch.empty(0)
    groups = batches_of([_longest(options) for options, _ in questions], [len(o) for o, _ in questions], batch_tokens)
    with _differentiable(model), bar_of(desc="slopes", total=len(questions), unit="item", progress=progress) as bar:
        for chosen in groups:
            answers = [answer for number in chosen for answer in questions[number][0]]
            owner = [place for place, number in enumerate(chosen) for _ in questions[number][0]]
            with pushed(sites) as pushes:
                log_p = _log_likelihoods(model, answers)
                odds = [log_odds(part, questions[n][1]) for part, n in zip(_split(log_p, owner), chosen, strict=True)]
                rows = _summed(torch.autograd.grad(torch.stack(odds).sum(), pushes), answers, edited)
            if not len(found):
                found = rows.new_zeros(len(questions), *rows.shape[1:])
            found.index_add_(0, torch.tensor([chosen[place] for place in owner]), rows)
            bar.update(len(chosen))
    return found


def samples_of_divergence(
    model: nn.Module,
    sites: Sequence[nn.Module],
    texts: Sequence[Answer],
    *,
    draws: int = 8,
    seed: int = 0,
    edited: Edited = everywhere,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> Tensor:
    """Samples `s` of plain texts with `KL = (alpha^2 / 2) mean((s . v)^2)` nats a token, for a push of `alpha v`.

    Each is of one text and one draw, of which it is Gaussian along every `v`: the mean of n squares is known to a share
    of `sqrt(2 / n)` at best, and less well where texts differ.

    Returns:
        (texts * draws, sites, d_model), float32.

    Raises:
        NotDifferentiableError: the model has no gradient.
        OverflowError: its logits are not finite.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    limit = min(batch_tokens, max(1, MOST_LOGITS // vocabulary_of(model)))
    groups = batches_of([len(text.ids) for text in texts], [1] * len(texts), limit)
    with _differentiable(model), bar_of(desc="costs", total=len(texts), unit="text", progress=progress) as bar:
        for chosen in groups:
            answers = [texts[number] for number in chosen]
            with pushed(sites) as pushes:
                logits = _logits(model, answers, torch.arange(max(len(a.ids) for a in answers) - 1))
                chances = _chances(logits.detach(), answers)
                check_finite(chances[0], model)
                for draw in range(draws):
                    kept = draw < draws - 1
                    drawn = _drawn(chances, generator).to(logits.dtype)
                    grads = torch.autograd.grad(logits, pushes, drawn, retain_graph=kept)
                    rows = _summed(grads, answers, edited)
                    for number, answer, row in zip(chosen, answers, rows, strict=True):
                        found[number, draw] = row / (len(answer.ids) - 1) ** 0.5
            bar.update(len(chosen))
    return torch.stack([found[text, draw] for text in range(len(texts)) for draw in range(draws)])


# what is made of them


def slopes(gradients: Tensor, directions: Tensor) -> Tensor:
    """(questions, sites): how fast the log odds change, in nats a unit of length, along one direction a site."""
    return torch.einsum("nsd,sd->ns", gradients, directions)


def fisher(samples: Tensor, directions: Tensor) -> Tensor:
    """(sites,): the Fisher information a token along one direction a site; half of it is the divergence at length 1."""
    return torch.einsum("nsd,sd->ns", samples, directions).square().mean(0)


def information(samples: Tensor, directions: Tensor) -> Tensor:
    """(sites, sites): the same of pushes at two sites, whose diagonal is `fisher`.

    For pushes of `lengths` at all sites at once, the divergence is half of `lengths @ information @ lengths`.
    """
    along = torch.einsum("nsd,sd->ns", samples, directions)
    return along.T @ along / len(along)


def efficiency(gradients: Tensor, samples: Tensor, directions: Tensor) -> Tensor:
    """(sites,): the mean slope for a square root of the Fisher information."""
    return slopes(gradients, directions).mean(0) / fisher(samples, directions).sqrt()


def along_random(gradient: Tensor, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What random unit vectors do at one site: (directions,), how far each moves the log odds whose gradient this is
    (d_model), and (directions, samples), what it costs, of samples (samples, d_model)."""
    drawn = torch.randn(RANDOM, samples.shape[1], generator=generator)
    drawn /= drawn.norm(dim=1, keepdim=True)
    return drawn @ gradient, drawn @ samples.T


def efficiency_of_random(gradient: Tensor, samples: Tensor, generator: torch.Generator) -> Tensor:
    """(directions,): how efficient random directions are at one site, whichever way they point."""
    moved, costs = along_random(gradient, samples, generator)
    return moved.abs() / costs.square().mean(1).sqrt()


# pushes


class PushHook(Hook):
    """Adds zeros to a module's output, by which its gradient is known."""

    def __init__(self, pushes: list[Tensor], place: int) -> None:
        self.pushes, self.place = pushes, place

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        hidden = hidden_of(output)
        self.pushes[self.place] = push = torch.zeros_like(hidden, requires_grad=True)
        return with_hidden(output, hidden + push)


@contextmanager
def pushed(sites: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The zeros that are added to each site's latest output while the context lasts."""
    pushes = [torch.empty(0)] * len(sites)
    with ExitStack() as hooks:
        for place, site in enumerate(sites):
            hooks.callback(put(site, PushHook(pushes, place)))
        yield pushes


class NotDifferentiableError(RuntimeError):
    """A model has no gradient."""


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    except (RuntimeError, NotImplementedError) as error:  # as of quantised kernels
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        raise NotDifferentiableError(
            f"gradients were asked of {type(model).__name__}, which has none ({error!s:.200}); unquantised, it may have"
        ) from error


# answers -> logits


def batches_of(lengths: Sequence[int], rows: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of what has a length and so many rows, from the short to the long, as many tokens together as allowed."""
    batches: list[list[int]] = []
    height = 0
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        height += rows[number]
        if not batches or height * lengths[number] > limit:
            batches.append([])
            height = rows[number]
        batches[-1].append(number)
    return batches


def _longest(options: Sequence[Answer]) -> int:
    return max(len(answer.ids) for answer in options)


def _logits(model: nn.Module, answers: Sequence[Answer], columns: Tensor) -> Tensor:
    given = pad([answer.ids[:-1] for answer in answers], device=device_of(model))
    with prompts_end(model, torch.tensor([answer.begins for answer in answers])):
        return logits_at(model, given, columns)


def _log_likelihoods(model: nn.Module, answers: Sequence[Answer]) -> Tensor:
    """(answers,), log P of each behind its prompt, in nats."""
    first = min(answer.begins for answer in answers) - 1
    logits = _logits(model, answers, torch.arange(first, max(len(answer.ids) for answer in answers) - 1))
    places = [(row, column - first) for row, a in enumerate(answers) for column in range(a.begins - 1, len(a.ids) - 1)]
    rows, columns = torch.tensor(places, device=logits.device).unbind(1)
    tokens = torch.tensor([token for a in answers for token in a.ids[a.begins :]], device=logits.device)
    found = log_probability(logits[rows, columns], tokens)
    check_finite(found, model)
    return found.new_zeros(len(answers)).index_add(0, rows, found)


def _split(log_p: Tensor, owner: Sequence[int]) -> list[Tensor]:
    owners = torch.tensor(owner)
    return [log_p[owners == place] for place in range(max(owner) + 1)]


def _chances(logits: Tensor, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """P, (rows, tokens, vocabulary), and which of the tokens predict another, (rows, tokens)."""
    lengths = torch.tensor([len(answer.ids) - 1 for answer in answers], device=logits.device)
    there = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    chance = torch.where(there[..., None], log_probabilities(logits).exp(), 1.0)  # padding may come out as anything
    return chance, there


def _drawn(chances: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """A Gaussian change of the logits whose covariance is that of one token drawn by its chance, and 0 at padding.

    The covariance is `diag(p) - p p^T`, and `sqrt(p) g - p (sqrt(p) . g)` has it. Tokens that are drawn outright have
    it too, but where rare ones matter most, a few draws miss them nearly always.
    """
    chance, there = chances
    drawn = torch.randn(chance.shape, generator=generator).to(chance) * chance.sqrt()
    return (drawn - chance * drawn.sum(-1, keepdim=True)) * there[..., None]


def _summed(gradients: Sequence[Tensor], answers: Sequence[Answer], edited: Edited) -> Tensor:
    """(rows, sites, d_model), over the edited tokens of each row."""
    width = gradients[0].shape[1]
    masks = torch.zeros(len(answers), width, 1, dtype=torch.bool)
    for row, answer in enumerate(answers):
        masks[row, : len(answer.ids) - 1, 0] = edited(answer)
    return torch.stack([torch.where(masks.to(g.device), g.float(), 0).sum(1).cpu() for g in gradients], dim=1)
