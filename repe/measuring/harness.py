"""The harness: any task of EleutherAI's lm-eval, measured on a steered model at many strengths.

lm-eval makes the requests and the metrics; the log-likelihoods come of a scorer, which knows which tokens are the
context's: with scope="answer" the last of them is steered, and all after it. lm-eval asks the same at every strength:
all are scored at once, when it asks first. It is an extra, and loaded when it is used: pip install 'repe-torch[eval]'.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from repe.data.answers import Answer
from repe.display import bar_of, is_wanted
from repe.measuring.curve import Scores
from repe.measuring.fanout import BATCH_TOKENS
from repe.measuring.scoring import TransformersScorer, strengths_of
from repe.reading.capture import evaluating
from repe.steering.edit import Edit, EditOptions, spells_options
from repe.steering.steer import Steered, edit_of

LmEvalTask = str | Mapping[str, Any]

SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own, of the random numbers of Python, NumPy, PyTorch and few-shot examples


@spells_options
def scores(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    task: LmEvalTask,
    alphas: Sequence[float] | Tensor,
    *,
    task_folder: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    batch_tokens: int = BATCH_TOKENS,
    apply_chat_template: bool = False,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> Scores:
    """Measure the log-likelihoods of all choices of a multiple-choice task, at every strength; documents are the items.

    Args: as for `evaluate`, with one task, or one group of tasks, whose documents then follow one another.

    Returns:
        `Scores`, one row a strength, in ascending order, in nats; what `TradeoffCurve` takes as `helpfulness`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: the task's output is not of the type multiple_choice, a document has no single right choice, or what
            `evaluate` raises.
    """
    strengths = strengths_of(alphas)
    loaded = _loaded([task], task_folder, num_fewshot, _check_choices)
    rows: list[list[list[float]]] = []
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, batch_size=batch_size, progress=progress
    )
    harnessed = _kind()(scorer, edit, strengths)
    for alpha in bar_of(strengths, "lm-eval", unit="alpha", progress=progress):
        harnessed.measure(loaded, alpha, limit=limit, apply_chat_template=apply_chat_template)
        documents = [document for each in loaded["tasks"].values() for document in _documents(each)]
        rows.append([document.likelihoods for document in documents])
    most = max(map(len, rows[0]))
    table = np.array([[likelihoods + [np.nan] * (most - len(likelihoods)) for likelihoods in row] for row in rows])
    name = task if isinstance(task, str) else str(task["task"])
    return Scores(name, table, np.array([d.answer for d in documents]), [d.name for d in documents])


@spells_options
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    concept: Steered,
    tasks: LmEvalTask | Sequence[LmEvalTask],
    alphas: Sequence[float] | Tensor,
    *,
    task_folder: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    batch_tokens: int = BATCH_TOKENS,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 0,
    blocks_at: str | None = None,
    progress: bool | None = None,
    **options: Unpack[EditOptions],
) -> list[dict[str, Any]]:
    """Let lm-eval measure its own metrics of its tasks, of whatever type, at every strength.

    All strengths see the same requests: few-shot examples are drawn once, and sampled texts are sampled alike. The
    contexts of generate_until are prompts; of loglikelihood_rolling, the one token before each window. Logarithms
    are taken in float32, whatever the model's dtype.

    Args:
        model, tokenizer: neither is changed; nor are the states of random number generators.
        concept: what is steered along, as in `repe.steer`.
        tasks: names of lm-eval's tasks and groups, paths of YAML files, or configurations as mappings.
        alphas: the strengths, finite; sorted, each once.
        task_folder: a folder with YAML files of more tasks.
        limit: only the first documents of every task: how many, or which share where it is below 1.
        num_fewshot: examples before every question, but for tasks that demand none; by default the task's own number.
        batch_size: texts that are written at a time.
        batch_tokens: tokens a forward that scores, at most.
        apply_chat_template: write contexts as chats, by the tokenizer's template as lm-eval renders it.
        bootstrap_iters: resamples for the standard errors of metrics that need them; 0: no standard errors at all.
        progress: show progress bars; None: where a terminal or a notebook shows them.
        blocks_at: the dotted path of the list of blocks, where it cannot be found.
        options: of the edit, as in `repe.steer`.

    Returns:
        One row a strength, task and metric, with the keys "alpha", "task", "metric", "filter", "value", "stderr" (NaN
        where there is none) and "higher_is_better".

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no alphas or a number that is not finite, a task that is not known, a scope that is a mask, a model
            that is not causal, a continuation of no tokens or more than the model reads, or what `repe.steer` raises.
        OverflowError: logits are not finite at a strength.

    Warns:
        UserWarning: contexts were too long for the model, and lost their first tokens.

    Example:
        >>> of = model, tokenizer, "honesty"
        >>> harness.evaluate(*of, ["arc_easy", "gsm8k"], [0, 1], limit=20)  # doctest: +SKIP
    """
    strengths = strengths_of(alphas)
    asked = [tasks] if isinstance(tasks, str | Mapping) else list(tasks)
    loaded = _loaded(asked, task_folder, num_fewshot, lambda task: None)
    chosen = {"limit": limit, "apply_chat_template": apply_chat_template, "bootstrap_iters": bootstrap_iters}
    edit = edit_of(model, concept, tokenizer, blocks_at=blocks_at, **options)
    scorer = TransformersScorer(
        model, tokenizer, blocks_at=blocks_at, batch_tokens=batch_tokens, batch_size=batch_size, progress=progress
    )
    harnessed = _kind()(scorer, edit, strengths)
    shown = bar_of(strengths, "lm-eval", unit="alpha", progress=progress)
    return [row for alpha in shown for row in _rows(alpha, harnessed.measure(loaded, alpha, **chosen))]


# tasks


def _loaded(
    tasks: Sequence[LmEvalTask],
    folder: str | os.PathLike[str] | None,
    num_fewshot: int | None,
    check: Callable[[Any], None],
) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, ready to be run again and again once a check of their requests is passed."""
    specs = [task if isinstance(task, str) else copy.deepcopy(dict(task)) for task in tasks]
    if not specs:
        raise ValueError("expected at least one task, got none")
    with _seeded():
        loaded: dict[str, Any] = _found(specs, folder)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own or 0 if own == 0 or num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(SEEDS[3])
        _build_once(task, check)
    return loaded


def _found(specs: list[Any], folder: str | os.PathLike[str] | None) -> Any:
    """What lm-eval has for names, files and configurations. Its own tasks are gone through, which takes a while, only
    where others are not enough.

    Raises:
        ValueError: a task is not known.
    """
    kind = _imported("lm_eval.tasks").TaskManager
    path = None if folder is None else os.fspath(folder)
    try:
        return kind(include_path=path, include_defaults=False).load(specs)
    except KeyError:
        every = kind(include_path=path)
    for name in (spec for spec in specs if isinstance(spec, str) and not Path(spec).is_file()):
        if name not in every.all_tasks:
            near = difflib.get_close_matches(name, every.all_tasks) or "none is named alike"
            raise ValueError(f"lm-eval has no task {name!r} (near: {near}): name another, a file, or its `task_folder`")
    return every.load(specs)


def _build_once(task: Any, check: Callable[[Any], None]) -> None:
    """Lets a task write its requests once, so that all strengths are asked the same."""
    build = task.build_all_requests
    written: list[Any] = []

    def build_once(**how: Any) -> None:
        if not written:
            build(**how)
            check(task)
            written.extend(task.instances)
        for request in written:
            request.resps, request.filtered_resps = [], {}

    task.build_all_requests = build_once


@dataclass(frozen=True)
class Document:
    """One document of a task: the requests for its choices, and which of them is right."""

    name: str
    requests: list[Any]
    answer: int

    @property
    def likelihoods(self) -> list[float]:
        return [request.resps[0][0] for request in self.requests]


def _documents(task: Any) -> Iterator[Document]:
    """Raises ValueError at a document that has no single right choice."""
    for number, group in groupby(task.instances, key=lambda request: request.doc_id):
        requests, name = list(group), f"{task.task_name}/{number}"
        document = requests[0].doc
        choices = list(task.doc_to_choice(document))
        given = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        answer = choices.index(given) if given in choices else given
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"document {name} has no single right choice: {given!r} of {len(choices)}. Use `evaluate`")
        yield Document(name, requests[: len(choices)], answer)


def _check_choices(task: Any) -> None:
    if task.OUTPUT_TYPE != "multiple_choice":
        name, kind = task.task_name, task.OUTPUT_TYPE
        raise ValueError(f"scores are of tasks of the type multiple_choice, and {name!r} is {kind}: use `evaluate`")
    list(_documents(task))


def _rows(alpha: float, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filtered}")
                row = {"alpha": alpha, "task": task, "metric": metric, "filter": filtered, "value": value}
                row["stderr"] = error if isinstance(error, float) else math.nan
                yield row | {"higher_is_better": results["higher_is_better"].get(task, {}).get(metric)}


# running


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as lm-eval seeds them; afterwards they go on as if none had been drawn."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])  # noqa: NPY002
        torch.manual_seed(SEEDS[2])
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def answer_of(context: Sequence[int], continuation: Sequence[int], longest: int) -> Answer:
    """A request as an answer. Contexts lose their first tokens where both are together longer than the model reads.

    Raises:
        ValueError: the continuation has no tokens, or more than the model reads.

    Example:
        >>> answer_of([1, 2, 3], [4], longest=2)
        Answer(ids=(2, 3, 4), begins=2)
    """
    if not 0 < len(continuation) <= longest:
        raise ValueError(f"a continuation has {len(continuation)} tokens, and the model reads 1 to {longest}")
    ids = tuple((*context, *continuation)[-longest - 1 :])
    return Answer(ids, len(ids) - len(continuation))


class Harnessed:
    """What of lm-eval's model is done otherwise for a steered one; `_kind()` is both."""

    max_length: int
    batch_size_per_gpu: int

    def __init__(self, scorer: TransformersScorer, edit: Edit, strengths: Sequence[float]) -> None:
        own = {"tokenizer": copy.deepcopy(scorer.tokenizer), "batch_size": scorer.batch_size}
        with _speechless("lm_eval.models.huggingface"):
            super().__init__(pretrained=scorer.model, **own)  # type: ignore[call-arg]
        self._scorer, self._edit, self._strengths, self._alpha = scorer, edit, strengths, 0.0
        self._known: dict[Answer, tuple[Tensor, Tensor]] = {}

    @property
    def model(self) -> Any:
        """None while lm-eval sets itself up, which would tie the model's weights anew."""
        return self._scorer.model if hasattr(self, "_scorer") else None

    def measure(self, loaded: Mapping[str, Any], alpha: float, bootstrap_iters: int = 0, **chosen: Any) -> Any:
        """lm-eval's results at one strength."""
        self._alpha = alpha
        chosen |= {"bootstrap_iters": bootstrap_iters, "fewshot_as_multiturn": chosen["apply_chat_template"]}
        with _seeded(), evaluating(self._scorer.model):
            return _imported("lm_eval.evaluator").evaluate(self, loaded, log_samples=False, **chosen)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=not is_wanted(self._scorer.progress))  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """All windows at once."""
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, sys.maxsize
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=not is_wanted(self._scorer.progress))  # type: ignore[misc]
        finally:
            self.batch_size_per_gpu = before

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._scorer.steered(self._edit) as handle:
            assert handle is not None
            handle.alpha = self._alpha
            return super().generate_until(requests, disable_tqdm=not is_wanted(self._scorer.progress))  # type: ignore[misc]

    def _model_generate(self, context: Any, **chosen: Any) -> Any:
        """Without the model's own limit of new tokens, which would go before the task's."""
        return super()._model_generate(context, **{"max_new_tokens": None} | chosen)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """log P(continuation | context), and whether it is what the model would write greedily, of every request."""
        answers = [answer_of(context, continuation, self.max_length) for _, context, continuation in requests]
        if lost := sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests):
            what = f"{lost} contexts are too long for {self.max_length} tokens, and lost their first ones"
            warnings.warn(what, stacklevel=2)
        if new := [answer for answer in dict.fromkeys(answers) if answer not in self._known]:
            found = self._scorer.log_likelihoods(new, self._edit, self._strengths)
            self._known.update(zip(new, zip(found.log_p.T, found.greedy.T, strict=True), strict=True))
        at = self._strengths.index(self._alpha)
        known = [self._known[answer] for answer in answers]
        return [(float(log_p[at]), bool(greedy[at])) for log_p, greedy in known]


# lm-eval


@cache
def _kind() -> Any:
    """lm-eval's model class, with what is done otherwise."""
    return type("HarnessedHFLM", (Harnessed, _imported("lm_eval.models.huggingface").HFLM), {})


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"tasks of lm-eval need a package that is not installed ({error}): pip install 'repe-torch[eval]'"
        ) from error


@contextmanager
def _speechless(name: str) -> Iterator[None]:
    """Without a logger's warnings, for what is done on purpose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
