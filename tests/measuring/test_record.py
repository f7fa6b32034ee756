"""The record: what was measured is not measured again, whatever else is asked for and in whatever process."""

import json
import math
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import repe
from repe.data.answers import answers_of
from repe.data.items import Item
from repe.measuring.costs import costs
from repe.measuring.record import Page, Record, missing, name_of
from repe.measuring.scoring import AnswerFanout, TransformersScorer
from repe.measuring.sweep import sweep
from repe.measuring.write import write
from repe.steering import Edit
from tests import oracles, zoo

TASKS = {
    "some": [Item("ab", ("cdef", "c", "cd", "x"), 1), Item("abc", ("d", "yz")), Item("ab", ("yyy", "cz"), 1)],
    "one": [Item("then a long one", ("!", "?!", ", a"), 2)],
}
TEXTS = ["a text of some length", "short", "another text"]
ALPHAS = (-1.0, 0.0, 0.7)
SPLIT: dict[str, Any] = {"batch_tokens": 12, "scope": "answer"}


@pytest.fixture(scope="module")
def vector() -> Any:
    return oracles.vector(recommended=(2,))


@pytest.fixture
def forwards(monkeypatch: Any, model: Any) -> list[tuple[int, ...]]:
    """The shapes of a Llama's forwards, as they come."""
    shapes: list[tuple[int, ...]] = []
    kind = type(model.model)
    real = kind.forward

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return shapes


class Stop(BaseException):
    """As Ctrl-C."""


# what is there is not measured again


def test_a_sweep_that_was_broken_off_goes_on_where_it_was(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    path, real = tmp_path / "deeper" / "kept", Page.add
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, **SPLIT)
    in_all = len(forwards)

    def stopping(self: Any, rows: Any) -> None:
        real(self, rows)
        raise Stop

    known = 0
    monkeypatch.setattr(Page, "add", stopping)
    for _ in range(100):
        try:
            assert sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT) == whole
        except Stop:
            lines = path.read_text().split("\n")
            assert [json.loads(line) for line in lines[:-1]]
            assert lines[-1] == ""
            assert len(lines) - 2 > known  # more rows each time
            known = len(lines) - 2
            assert not repe.status(model)
        else:
            break
    assert known == 11  # one row an option
    forwards.clear()
    assert sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT) == whole
    assert not forwards
    assert in_all


def test_more_strengths_items_and_edits_may_follow(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    path = tmp_path / "kept"
    few = sweep(model, tokenizer, vector, {"some": TASKS["some"]}, ALPHAS[:2], resume=path, **SPLIT)
    for tasks, alphas, how in (
        ({"some": TASKS["some"]}, ALPHAS, {}),
        (TASKS, ALPHAS, {}),
        (TASKS, ALPHAS, {"scope": "all"}),
        (TASKS, ALPHAS, {"edit": "ablate"}),
        (TASKS, ALPHAS, {"blocks": [1, 2]}),
        (TASKS, ALPHAS, {"gate": repe.Gate(oracles.vector(seed=3), block=0)}),
        (TASKS, ALPHAS, {"gate": repe.Gate(oracles.vector(seed=3), block=0, threshold=0.1)}),
    ):
        forwards.clear()
        found = sweep(model, tokenizer, vector, tasks, alphas, resume=path, **{**SPLIT, **how})
        assert forwards
        for name, scores in sweep(model, tokenizer, vector, tasks, alphas, **{**SPLIT, **how}).items():
            np.testing.assert_allclose(found[name].log_likelihoods, scores.log_likelihoods, atol=1e-4)
        forwards.clear()
        assert sweep(model, tokenizer, vector, tasks, alphas[::2], resume=path, **{**SPLIT, **how})
        assert not forwards
    np.testing.assert_array_equal(found["some"].log_likelihoods.shape[1:], few["some"].log_likelihoods.shape[1:])


def test_what_is_known_is_not_run_with_what_is_not(
    monkeypatch: Any, model: Any, tokenizer: Any, vector: Any, tmp_path: Any
):
    path, asked, real = tmp_path / "kept", [], AnswerFanout.at
    sweep(model, tokenizer, vector, {"some": TASKS["some"]}, ALPHAS[:2], resume=path)

    def watched(fan: Any, batch: Any, alphas: Any) -> Any:
        if batch.trees:
            asked.append((sorted(fan.answers[text].ids for text in batch.texts), alphas.tolist()))
        return real(fan, batch, alphas)

    monkeypatch.setattr(AnswerFanout, "at", watched)
    sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    (old, at_old), (new, at_new) = sorted(asked, key=lambda each: len(each[1]))
    assert at_old == pytest.approx([0.7])
    assert at_new == pytest.approx(ALPHAS)
    assert len(old) == 8
    assert len(new) == 3


def test_costs_texts_and_judgements_are_kept_in_the_same_file(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    path, asked = tmp_path / "kept", []

    def length(prompt: str, text: str) -> float:
        asked.append(text)
        return float(len(text))

    def all_of_it(resume: Any) -> list[Any]:
        writes = {"judge": length, "max_new_tokens": 4, "scope": "answer", "resume": resume}
        return [
            sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=resume, **SPLIT),
            costs(model, tokenizer, vector, TEXTS, ALPHAS, resume=resume, **SPLIT),
            write(model, tokenizer, vector, TEXTS, ALPHAS, **writes),
        ]

    first = all_of_it(path)
    assert {json.loads(line)["kind"] for line in path.read_text().splitlines()[1:]} == {
        "log-likelihood", "costs", "text", "judgement by length",
    }  # fmt: skip
    forwards.clear()
    asked.clear()
    assert all_of_it(path) == first
    assert not forwards
    assert not asked
    assert all_of_it(None) == first


def test_a_trade_off_resumes_all_that_it_measures(model: Any, tokenizer: Any, forwards: list, tmp_path: Any) -> None:
    chats = [
        Item(({"role": "user", "content": f"{word}?"},), ("yes", "no"), i % 2, f"g{i // 2}")
        for i, word in enumerate("abcdefgh")
    ]
    how: dict[str, Any] = {
        "alignment": chats, "helpfulness": chats, "neutral": TEXTS, "controls": 2, "baseline": {"kind": "Be kind."},
        "requests": None,
    }  # fmt: skip
    curve = repe.tradeoff(model, tokenizer, oracles.vector(3), [1.0], resume=tmp_path / "kept", **how)
    forwards.clear()
    assert repe.tradeoff(model, tokenizer, oracles.vector(3), [1.0], resume=tmp_path / "kept", **how) == curve
    assert not forwards


def test_another_process_with_other_hashes_goes_on(tmp_path: Any) -> None:
    """Nothing in the file depends on the order of a set, or the hash of a string."""
    code = f"""if True:
        from repe.measuring.sweep import sweep
        from repe.measuring.write import write
        from repe.data.items import Item
        import repe
        from tests import oracles, zoo
        def judge(prompt, text):
            return float(text in {{"a", "b", "c"}})
        gate = repe.Gate(oracles.vector(seed=3), block=0)
        model, tokenizer, vector = zoo.build("llama"), zoo.tokenizer(), oracles.vector()
        count = [0]
        real = type(model.model).forward
        def forward(self, *args, **kwargs):
            count[0] += 1
            return real(self, *args, **kwargs)
        type(model.model).forward = forward
        kept = {str(tmp_path / "kept")!r}
        tasks, how = {{"t": [Item("ab", ("c", "d"))]}}, {{"gate": gate, "scope": [0, -1]}}
        with repe.steer(model, oracles.vector(seed=4), 0.5, blocks=0):
            found = sweep(model, tokenizer, vector, tasks, [0, 1], resume=kept, **how)
            write(model, tokenizer, vector, ["ab"], [1.0], max_new_tokens=3, judge=judge, resume=kept)
        print(count[0], found["t"].log_likelihoods.tolist())
    """
    told = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        told.append(done.stdout.split(maxsplit=1))
    (first, numbers), (second, again) = told
    assert int(first) > 0
    assert int(second) == 0
    assert numbers == again


def test_strengths_that_are_missing_are_told_with_the_texts_that_lack_just_these() -> None:
    assert missing([{0.0: 1}, {}, {0.0: 1, 1.0: 1}, {}, {1.0: 1}], [0.0, 1.0]) == {
        (1.0,): [0], (0.0, 1.0): [1, 3], (0.0,): [4],
    }  # fmt: skip


# what is read


def names_in(written: bytes) -> list[str]:
    """What every line but the first is of."""
    return [json.dumps(json.loads(line)["of"]) for line in written.split(b"\n")[1:-1]]


def test_what_was_written_after_the_last_line_break_is_forgotten(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT)
    written = path.read_bytes()
    ends = [place for place, byte in enumerate(written) if byte == ord("\n")]
    edit, names = Edit.of(vector, scope="answer"), [json.loads(line)["of"] for line in written.split(b"\n")[1:-1]]
    for cut in {*range(0, len(written), 97), *ends, *(end + 1 for end in ends)}:
        path.write_bytes(written[:cut])
        known = Record.open(path, model).page("log-likelihood", edit).known(names, lambda text, value: True)
        assert sum(map(bool, known)) == max(written[:cut].count(b"\n") - 1, 0)
        assert path.read_bytes() == written[:cut]  # until there is more
    for cut in (20, ends[3] + 9, len(written) - 9):
        path.write_bytes(written[:cut])
        again = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, **SPLIT)
        for name, scores in whole.items():  # what is measured again stands in other batches, which round otherwise
            np.testing.assert_allclose(again[name].log_likelihoods, scores.log_likelihoods, rtol=1e-5)
        assert sorted(names_in(path.read_bytes())) == sorted(names_in(written))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row["values"][0][0].append(1.0), "1 values do not fit"),
        (lambda row: row["values"][0][0].__setitem__(0, "3"), "1 values do not fit"),
        (lambda row: row["values"].__setitem__(0, [[float("nan")], [0.0]]), "1 values do not fit"),
        (lambda row: row["values"].__setitem__(0, None), "1 values do not fit"),
        (lambda row: row["values"].pop(), "line 2 is no row of a record"),
        (lambda row: row.pop("alphas"), "line 2 is no row of a record"),
        (lambda row: row.update(alphas="abc"), "line 2 is no row of a record"),
    ],
)
def test_rows_that_do_not_fit_are_measured_again_and_told_of(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any, change: Any, told: str
) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    head, first, *rest = path.read_text().split("\n")
    row = json.loads(first)
    change(row)
    path.write_text("\n".join([head, json.dumps(row), *rest]))
    with pytest.warns(UserWarning, match=f"kept: {told}.*measured again"):
        found = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    for name, scores in whole.items():
        np.testing.assert_allclose(found[name].log_likelihoods, scores.log_likelihoods, atol=1e-4)


NONSENSE = [
    None, True, "0.5", "", [], {}, [None], math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, 5.0, "\ud800", [[[]]],
    [0.0], [[0.0], [0.0], [0.0]],
]  # fmt: skip
"""Which no value of log-likelihoods, no strength and no list of them can be: 5 nats are more than certainty."""


@settings(max_examples=40)
@given(
    place=st.sampled_from(["edit", "of", "kind", "beside", "alphas", "values", "an alpha", "a value", "a number"]),
    nonsense=st.sampled_from(NONSENSE),
    number=st.integers(0, 11),
)
def test_nonsense_in_a_record_is_never_taken_for_what_was_measured(
    model: Any, tokenizer: Any, vector: Any, tmp_path_factory: Any, place: str, nonsense: Any, number: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "spoilt"
    path.unlink(missing_ok=True)
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    head, *lines = path.read_text().splitlines()
    row = json.loads(lines[number % len(lines)])
    spots = {"an alpha": (row["alphas"], 1), "a value": (row["values"], 1), "a number": (row["values"][1][0], 0)}
    where, spot = spots.get(place, (row, place))
    assume(place != "an alpha" or nonsense != 5.0)
    where[spot] = nonsense
    lines[number % len(lines)] = json.dumps(row)
    path.write_text("\n".join([head, *lines, ""]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    for name, scores in whole.items():
        np.testing.assert_allclose(found[name].log_likelihoods, scores.log_likelihoods, atol=1e-4)


@pytest.mark.parametrize("text", ["\ud800", 5, None, ["a"], {}, True])
def test_what_is_no_text_is_written_anew(model: Any, tokenizer: Any, vector: Any, tmp_path: Any, text: Any) -> None:
    path, how = tmp_path / "kept", {"max_new_tokens": 3}
    whole = write(model, tokenizer, vector, TEXTS, ALPHAS, resume=path, **how)
    head, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["values"] = [text]
    path.write_text("\n".join([head, *map(json.dumps, rows), ""]))
    with pytest.warns(UserWarning, match="1 values do not fit, and are measured again"):
        assert write(model, tokenizer, vector, TEXTS, ALPHAS, resume=path, **how).texts == whole.texts


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "\udcff", '{"alphas": [1%s]}' % ("0" * 5000)])
def test_lines_that_no_parser_reads_are_told_of(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any, line: str
) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    path.write_bytes(path.read_bytes() + f"{line}\n".encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"kept: line 13 is no row of a record"):
        assert sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path) == whole
    path.write_bytes(f"{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"holds something else, not a record of the format.*name another file"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)


def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is no ordinary file, and a record is kept in one: name another"):
            sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)


@pytest.mark.parametrize("line", ["{}", "7", "not json", "null", '"kind"', ""])
def test_a_line_that_is_no_row_is_told_of(model: Any, tokenizer: Any, vector: Any, tmp_path: Any, line: str) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    path.write_text(path.read_text() + f"{line}\n")
    with pytest.warns(UserWarning, match=r"kept: line 13 is no row of a record"):
        assert sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path) == whole


def test_an_added_field_is_read(model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any) -> None:
    path = tmp_path / "kept"
    whole = sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    lines = [{**json.loads(line), "added": "later"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    forwards.clear()
    assert sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path) == whole
    assert not forwards


# whose file it is


@pytest.mark.parametrize(
    "content", [b"notes", b"notes\n", b"\xff\xfe\x00", b'{"format": "repe.record/2"}', b"\n", b"[]\n", b"7\n"], ids=repr
)
def test_a_file_that_is_no_record_is_refused_and_left_alone(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any, content: bytes
) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(content)
    got = "the format 'repe.record/2'" if b"format" in content else "something else"
    with pytest.raises(ValueError, match=f"theirs holds {got}, not a record.*: name another file$"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    assert path.read_bytes() == content


def retrained() -> Any:
    model = zoo.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def test_a_record_of_another_model_or_dtype_is_refused_and_left_alone(
    model: Any, tokenizer: Any, vector: Any, tmp_path: Any
) -> None:
    path = tmp_path / "kept"
    sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path)
    written = path.read_bytes()
    with pytest.raises(ValueError, match="kept is a record of another model: name another file"):
        sweep(retrained(), tokenizer, vector, TASKS, ALPHAS, resume=path)
    with pytest.raises(ValueError, match="kept is a record of another dtype: name another file"):
        sweep(zoo.build("llama").bfloat16(), tokenizer, vector, TASKS, ALPHAS, resume=path)
    with pytest.raises(ValueError, match="kept is a record of other blocks: name another file"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=path, blocks_at="model.layers")
    assert path.read_bytes() == written


def test_what_was_measured_beside_other_handles_is_measured_again(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    """Whether they come, go or change before a record is opened or while it is open."""
    path, scorer = tmp_path / "kept", None
    answers = answers_of(tokenizer, TASKS["some"])
    with repe.steer(model, oracles.vector(seed=1), 0.5) as own:
        scorer = TransformersScorer(model, tokenizer, resume=path)
        own.alpha = 0.0
        found = {}
        for alpha in (0.0, 0.5, 0.0, 0.6, 0.5):
            own.alpha = alpha
            forwards.clear()
            log_p = scorer.log_likelihoods(answers, Edit.of(vector), [0.0, 1.0]).log_p
            assert bool(forwards) == (alpha not in found)
            assert torch.equal(found.setdefault(alpha, log_p), log_p)
    assert len({float(log_p.sum()) for log_p in found.values()}) == 3
    forwards.clear()
    plain = scorer.log_likelihoods(answers, Edit.of(vector), [0.0, 1.0]).log_p
    assert forwards  # nobody told that a handle at 0 is none
    torch.testing.assert_close(plain, found[0.0], atol=1e-4, rtol=0)


def test_two_runs_may_keep_what_they_measure_in_one_file(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    path, edit = tmp_path / "kept", Edit.of(vector)
    answers = answers_of(tokenizer, TASKS["some"])
    for begun in (b"", b'{"format": "repe.rec'):
        path.write_bytes(begun)
        scorers = [TransformersScorer(model, tokenizer, resume=path) for _ in range(2)]
        for alpha in (0.0, 1.0):
            for scorer in scorers:
                assert scorer.log_likelihoods(answers, edit, [alpha]).log_p.isfinite().all()
        with path.open("ab") as file:
            file.write(b'{"kind": "log-l')  # a third run ended as it wrote
        scorers[0].log_likelihoods(answers, edit, [2.0])
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum("format" in line for line in lines) == 1
        assert len(lines) == 1 + (2 * 2 + 1) * len(answers)
        forwards.clear()
        TransformersScorer(model, tokenizer, resume=path).log_likelihoods(answers, edit, [0.0, 1.0])
        assert not forwards


def test_a_gate_that_cannot_be_told_from_others_makes_no_file(
    model: Any, tokenizer: Any, vector: Any, forwards: list, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="cannot be told of a function"):
        sweep(model, tokenizer, vector, TASKS, ALPHAS, resume=tmp_path / "x", gate=lambda mean, last: mean[:, 0] > 0)
    assert not forwards
    assert not (tmp_path / "x").exists()


def test_names_are_those_of_the_content() -> None:
    assert name_of([[1, 2], 1]) == name_of(((1, 2), 1)) != name_of([[1, 2], 2])
    assert len(name_of("a")) == 16
