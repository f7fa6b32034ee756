"""The benchmark: its statistics are right, its turns are fair, and all of it runs. Nothing here is about speed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from repe import bench
from repe.bench import edits, gpu, peer, peers, timing
from repe.bench.reading import evaluations, flat
from repe.bench.table import Row, line
from repe.bench.timing import Estimate, in_turns, slope
from repe.bench.workload import FACTS, Workload, shared, twin


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(small=True)


# statistics


@pytest.mark.parametrize("n", [6, 7, 20, 250])
def test_the_interval_covers_the_median_of_any_distribution(n: int) -> None:
    rng, repeats = np.random.default_rng(0), 2000
    estimates = [Estimate.of(rng.lognormal(sigma=2, size=n)) for _ in range(repeats)]
    covered = np.mean([e.low <= 1 <= e.high for e in estimates])  # the median of a lognormal
    assert 0.94 < covered < 0.995
    assert all(e.low <= e.value <= e.high for e in estimates)


def test_too_few_turns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 5 samples.*needs 6: run more turns"):
        Estimate.of([1.0] * 5)


def test_a_power_is_found() -> None:
    sizes = np.array([8, 16, 32, 64])
    seconds = np.outer([1.0, 2.0, 3.0, 1.5, 1.0, 5.0], sizes**1.5)
    assert slope(sizes, seconds).value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("bar", "ends", "met"),
    [("<= 1.02", (0.99, 1.019), True), ("<= 1.02", (0.99, 1.021), False), (">= 10", (10.1, 12), True),
     (">= 10", (9.9, 12), False), ("", (1, 1), None)],
)  # fmt: skip
def test_a_bar_is_met_if_the_worse_end_of_the_interval_meets_it(bar: str, ends: tuple, met: bool | None) -> None:
    row = Row("what", Estimate(sum(ends) / 2, *ends, 9), bar)
    assert row.met is met
    assert ("NOT met" in line(row)) is (met is False)


def test_what_was_left_out_says_so() -> None:
    assert "left out" in line(Row("kernels", None, note="no GPU"))


# turns


def test_turns_are_fair_and_the_clock_is_read_around_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(name: int, lasts: float):
        def act() -> None:
            order.append(name)
            now[0] += lasts

        return act

    seconds = in_turns([run(0, 1.0), run(1, 2.0), run(2, 4.0)], turns=6, warm=1)
    assert seconds.tolist() == [[1.0, 2.0, 4.0]] * 6
    turns = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert order[:3] == [0, 1, 2]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert [turn[0] for turn in turns] == [0, 1, 2, 0, 1, 2]


# what is timed


def test_a_twin_has_the_same_memory_and_edits_of_its_own(work: Workload) -> None:
    other = twin(work.model)
    pointers = [[t.data_ptr() for t in shared(model)] for model in (work.model, other)]
    assert pointers[0] == pointers[1]
    assert not {*map(id, work.model.modules())} & {*map(id, other.modules())}


def test_pairs_are_made_as_the_paper_makes_them(work: Workload) -> None:
    pairs = work.repe_pairs(512)
    assert len(pairs) == 512
    said = [one.partition("ASSISTANT: ")[2] for one, _ in pairs]
    assert all(any(f"{fact} ".startswith(f"{statement} ") for fact in FACTS) for statement in said)
    assert all(one.replace("an honest", "an untruthful") == other for one, other in pairs)


def test_ten_times_fewer_blocks_are_run_for_pairs_of_the_paper(work: Workload) -> None:
    row = evaluations(work, flat(work.repe_pairs(512)))
    assert row.ratio is not None
    assert row.ratio.value >= 10


def test_texts_that_share_nothing_share_nothing(work: Workload) -> None:
    firsts = [text.split()[0] for text in work.unlike(64)]
    assert len({*firsts}) == 64
    assert work.tokenizer.unk_token_id not in work.tokenizer(work.unlike(4)).input_ids[0]


# all of it


def test_every_section_runs_and_comes_out_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    bench.main(["--small", "--turns", "6", "--steps", "6", "--json", "--threads", str(threads)])
    report = json.loads(capsys.readouterr().out)
    told = " ".join(row["what"] for row in report["rows"])
    for word in ("extract", "share nothing", "read", "memory", "decode step", "generate", "baked", "compiled", "sweep"):
        assert word in told
    (changes,) = (row for row in report["rows"] if "alpha changed" in row["what"])
    assert changes["met"]
    left_out = {row["what"] for row in report["rows"] if row["ratio"] is None}
    assert left_out == {"extract, against other libraries", "kernels of the edits", "a Llama of 8B shape, bfloat16"}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("section", "how", "why"),
    [("peers", ["--peers", "no/such/python"], "there is no interpreter no/such/python: `make .venv-peers` sets one up"),
     ("peers", [], "name their interpreter with --peers"), ("gpu", [], "runs on a GPU")],
)  # fmt: skip
def test_what_was_asked_for_by_name_and_is_left_out_is_an_error(
    section: str, how: list[str], why: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = str(torch.get_num_threads())
    with pytest.raises(SystemExit, match=f"(?s)this was left out.{section}: .*{why}"):
        bench.main(["--small", "--only", section, "--threads", threads, *how, *["--json"] * as_json])
    assert why in capsys.readouterr().out  # as it came


@pytest.mark.parametrize("link", [False, True])
def test_an_interpreter_named_from_here_is_found_from_the_folder_of_the_model(
    work: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, link: bool
) -> None:
    place = tmp_path / "environment" / "python"
    place.parent.mkdir()
    place.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    asked = "environment/python"
    if link:
        monkeypatch.setenv("PATH", str(place.parent))
        asked = "python"
    assert peer.interpreter(asked) == str(place)
    monkeypatch.setattr(peers, "PEERS", ("repeng",))
    (row,) = peers.rows(work, 6, asked)
    assert "ModuleNotFoundError" in row.note  # its process says, which has no packages there


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nat all"), AssertionError()])
def test_a_section_that_fails_says_why_and_keeps_what_it_had(error: Exception) -> None:
    def section():
        yield Row("first", Estimate.exact(1))
        raise error

    first, last = bench.guarded("compiled", section)
    assert first.what == "first"
    assert last.ratio is None
    assert last.note in ("RuntimeError: no compiler", "AssertionError: ")


def test_the_course_for_a_gpu_runs_in_small_on_the_cpu() -> None:
    kernels = [*edits.shares(16, 64, 6, "cpu", torch.bfloat16, "reference")]
    assert len(kernels) == len(edits.KINDS) * len(edits.DIRECTIONS)
    shape = {
        **gpu.SHAPE_8B, "vocab_size": 31_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    rows = [*gpu.large(gpu.Large("cpu", True, shape, torch.bfloat16), 6, 6, 32)]
    assert {row.ratio is not None for row in rows} == {True}
    assert rows[-1].met


def test_a_library_that_is_not_there_is_left_out(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", ("repeng",))
    (row,) = peers.rows(work, 6, sys.executable)
    assert row.ratio is None
    assert "ModuleNotFoundError" in row.note
