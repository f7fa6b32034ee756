"""The harness: lm-eval's tasks, with the numbers that the steered model has without lm-eval."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import repe
from repe.data.answers import Answer, answers_of
from repe.data.items import Item, load_items
from repe.measuring import harness
from repe.measuring.curve import TradeoffCurve
from repe.measuring.harness import evaluate, scores
from repe.measuring.scoring import AnswerFanout, TransformersScorer, log_likelihoods
from repe.testbed import FOLDER
from tests import oracles, zoo
from tests.oracles import plain_vector

ALPHAS = [1.0, -2.0, 0.0]
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="module")
def skills():
    return load_items(FOLDER / "tasks" / "skills.jsonl")[::12]


@pytest.fixture(scope="module")
def honesty(loaded_testbed):
    return repe.extract(*loaded_testbed, "honesty")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes the configuration of a task over rows, as a file that lm-eval reads."""

    def made(name, rows, **config):
        folder = tmp_path_factory.mktemp(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **config}

    return made


@pytest.fixture(scope="module")
def choosing(make, skills):
    rows = [{"question": i.prompt[0]["content"], "options": i.options, "answer": i.answer} for i in skills]
    return make(
        "choosing",
        rows,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="options",
        doc_to_target="answer",
        metric_list=[ACCURACY],
    )


def by_hand(testbed, vector, items, alpha, **how):
    model, tokenizer = testbed
    answers = answers_of(tokenizer, items)
    with repe.steer(model, vector, alpha, **how) as handle:
        found = []
        for answer in answers:
            handle.prompt_length = answer.begins
            found.append(oracles.log_p(model, answer.ids[: answer.begins], answer.ids[answer.begins :])[0])
    return list(torch.tensor(found).split([len(item.options) for item in items]))


@pytest.mark.parametrize("how", [{}, {"scope": "answer"}, {"scope": "prompt", "blocks": [1, 3]}], ids=str)
def test_scores_are_the_log_likelihoods_of_the_steered_model(testbed, honesty, choosing, skills, how):
    got = scores(*testbed, honesty, choosing, ALPHAS, apply_chat_template=True, **how)
    assert got.answers.tolist() == [item.answer for item in skills]
    assert got.name == "choosing"
    assert len(set(got.groups)) == len(skills)
    for row, alpha in zip(got.log_likelihoods, sorted(ALPHAS), strict=True):
        expected = torch.stack(by_hand(testbed, honesty, skills, alpha, **how))
        torch.testing.assert_close(torch.tensor(row).float(), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def asking(make, skills):
    """Answers are written, three tokens at most."""
    rows = [{"question": i.prompt[0]["content"], "answer": i.options[i.answer]} for i in skills]
    return make(
        "asking",
        rows,
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


@pytest.fixture(scope="module")
def rolling(make):
    texts = [json.loads(line)["text"] for line in (FOLDER / "tasks" / "statements.jsonl").read_text().splitlines()]
    rows = [{"text": text} for text in texts[:8]]
    metrics = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    return make(
        "rolling", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=metrics
    )


@pytest.fixture(scope="module")
def following(make, skills):
    """What follows, of several tokens, and whether the model would write it."""
    rows = [{"question": f"{i.prompt[0]['content']} It is", "answer": i.options[i.answer]} for i in skills]
    metrics = [ACCURACY, {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    return make(
        "following",
        rows,
        output_type="loglikelihood",
        doc_to_text="question",
        doc_to_target="answer",
        metric_list=metrics,
    )


def plain_harness(testbed, vector, tasks, alpha, **chosen):
    """lm-eval's own model class and metrics, around the steered model."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = testbed
    loaded = TaskManager(include_defaults=False).load(copy.deepcopy(tasks))
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)
    harnessed = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    with repe.steer(model, vector, alpha):
        return evaluator.evaluate(harnessed, loaded, bootstrap_iters=0, **chosen)


@pytest.mark.parametrize("chat", [False, True])
def test_metrics_of_every_type_are_those_of_lm_eval_around_the_steered_model(
    testbed, honesty, choosing, following, rolling, chat, make, skills
):
    tasks = [choosing, following, rolling]
    got = evaluate(*testbed, honesty, tasks, ALPHAS, apply_chat_template=chat)
    assert [row["alpha"] for row in got] == sorted(row["alpha"] for row in got)
    assert len(got) == 3 * (1 + 2 + 1)
    for alpha in ALPHAS:
        expected = plain_harness(testbed, honesty, tasks, alpha, apply_chat_template=chat)
        for row in (row for row in got if row["alpha"] == alpha):
            value = expected["results"][row["task"]][f"{row['metric']},{row['filter']}"]
            assert row["value"] == pytest.approx(value, rel=1e-4)
            assert row["higher_is_better"] is (row["metric"] == "acc")
            assert np.isnan(row["stderr"])


def test_what_is_written_is_what_the_steered_model_writes(testbed, honesty, asking, skills):
    got = evaluate(*testbed, honesty, asking, [-2.0, 0.0], apply_chat_template=True)
    assert [(row["task"], row["metric"]) for row in got] == [("asking", "exact_match")] * 2
    for row in got:
        with repe.steer(testbed[0], honesty, row["alpha"]):
            texts = repe.generate(*testbed, [item.prompt for item in skills], do_sample=False, max_new_tokens=3)
        right = [text == item.options[item.answer] for text, item in zip(texts, skills, strict=True)]
        assert row["value"] == pytest.approx(np.mean(right))


def test_one_task_leaves_no_trace_in_the_next(testbed, honesty, choosing, asking):
    """As where their contexts end, which the scope needs to know."""
    chosen = {"apply_chat_template": True, "scope": "answer"}
    alone = [row for task in (choosing, asking) for row in evaluate(*testbed, honesty, task, [-2.0], **chosen)]
    assert evaluate(*testbed, honesty, [choosing, asking], [-2.0], **chosen) == alone


# the same at every strength


def test_scores_at_0_are_those_of_the_unsteered_model(testbed, honesty, choosing, skills):
    got = scores(*testbed, honesty, choosing, [0.0], apply_chat_template=True)
    torch.testing.assert_close(
        torch.tensor(got.log_likelihoods[0]).float(),
        torch.stack(log_likelihoods(*testbed, skills)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_handle_of_the_user_s_own_edits_the_tokens_that_it_edits_without_the_harness(
    testbed, honesty, choosing, following, skills
):
    """In the answer; by plain hooks on texts that stand alone."""
    model, tokenizer = testbed
    other = repe.ConceptVector.random(honesty, 1)
    with repe.steer(model, other, 3.0, blocks=1, scope="answer", unit="gap"):
        got = scores(model, tokenizer, honesty, choosing, [2.0], apply_chat_template=True, blocks=3, unit="gap")
        loglikelihoods = evaluate(model, tokenizer, honesty, following, [2.0], blocks=3, unit="gap")
    for column, item in enumerate(skills):
        answers = answers_of(tokenizer, [item])
        own = oracles.shift_of(other, 3.0, 1), oracles.SCOPES["answer"][1], answers[0].begins, 1
        shift = oracles.shift_of(honesty, 2.0, 3), oracles.SCOPES["all"][1], answers[0].begins, 3
        with oracles.shifted(model, *own), oracles.shifted(model, *shift):
            expected = [oracles.log_p(model, a.ids[: a.begins], a.ids[a.begins :])[0] for a in answers]
        np.testing.assert_allclose(got.log_likelihoods[0, column], expected, atol=1e-3)
    assert len(loglikelihoods) == 2


def test_all_strengths_are_scored_when_lm_eval_asks_first(testbed, honesty, choosing, following, monkeypatch):
    asked, real = [], TransformersScorer.log_likelihoods

    def watched(scorer, answers, edit, alphas):
        asked.append((len(answers), alphas))
        return real(scorer, answers, edit, alphas)

    monkeypatch.setattr(TransformersScorer, "log_likelihoods", watched)
    evaluate(*testbed, honesty, [choosing, following], ALPHAS, apply_chat_template=True)
    assert asked == [(18 * 4 + 18, sorted(ALPHAS))]


def test_scores_do_not_depend_on_the_batch_nor_on_other_strengths(testbed, honesty, choosing):
    chosen = {"apply_chat_template": True, "num_fewshot": 2}
    together = scores(*testbed, honesty, choosing, ALPHAS, **chosen)
    for i, alpha in enumerate(sorted(ALPHAS)):
        alone = scores(*testbed, honesty, choosing, [alpha], batch_size=3, **chosen)
        np.testing.assert_allclose(alone.log_likelihoods[0], together.log_likelihoods[i], atol=1e-4)
    assert not np.allclose(
        scores(*testbed, honesty, choosing, [0.0], apply_chat_template=True).log_likelihoods[0],
        together.log_likelihoods[1],
        atol=0.1,
    )


def test_sampled_texts_are_sampled_alike_at_every_strength(testbed, honesty, asking):
    sampled = asking | {
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 3.0}
    }
    nothing = repe.ConceptVector.random(honesty, 0) * 1e-6
    values = [row["value"] for row in evaluate(*testbed, nothing, sampled, [0.0, 1.0, 2.0], apply_chat_template=True)]
    assert len(set(values)) == 1


def test_the_curve_takes_scores_as_helpfulness(testbed, honesty, choosing):
    found = scores(*testbed, honesty, choosing, ALPHAS, apply_chat_template=True)
    curve = TradeoffCurve("honesty", np.array(sorted(ALPHAS)), alignment=found, helpfulness=found)
    assert curve.helpfulness.accuracy[1].mean() > 0.9


# which tasks


def test_tasks_of_a_folder_are_found_by_name_and_groups_are_all_of_theirs(
    testbed, honesty, choosing, tmp_path, monkeypatch
):
    without_built_in_tasks(monkeypatch)
    halves = [choosing | {"task": name} for name in ("one", "other")]
    for half in halves:
        (tmp_path / f"{half['task']}.yaml").write_text(json.dumps(half))
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["one", "other"]}))
    chosen = {"task_folder": tmp_path, "apply_chat_template": True, "limit": 3}
    one, both = (scores(*testbed, honesty, name, [1.0], **chosen) for name in ("one", "both"))
    assert (one.name, both.name) == ("one", "both")
    assert one.groups == ("one/0", "one/1", "one/2")
    assert both.groups == (*one.groups, "other/0", "other/1", "other/2")
    np.testing.assert_array_equal(both.log_likelihoods[:, :3], one.log_likelihoods)
    by_path = scores(*testbed, honesty, str(tmp_path / "one.yaml"), [1.0], apply_chat_template=True, limit=3 / 18)
    np.testing.assert_array_equal(by_path.log_likelihoods, one.log_likelihoods)


def without_built_in_tasks(monkeypatch):
    """Indexing the thousands of tasks that come with lm-eval takes a while."""
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, include_path=None, **_: plain(
        self, include_path=include_path, include_defaults=False
    ))  # fmt: skip


def test_an_unknown_task_is_told_of_those_named_alike(testbed, honesty, choosing, tmp_path, monkeypatch):
    without_built_in_tasks(monkeypatch)
    (tmp_path / "choosing.yaml").write_text(json.dumps(choosing))
    with pytest.raises(ValueError, match=r"no task 'chosing' \(near: \['choosing'\]\)"):
        scores(*testbed, honesty, "chosing", ALPHAS, task_folder=tmp_path)
    with pytest.raises(ValueError, match="at least one task, got none"):
        evaluate(*testbed, honesty, [], ALPHAS)


def test_choices_may_be_contexts_and_may_be_measured_without_one_too(testbed, honesty, make, skills):
    """As in Winogrande, where the same words follow different beginnings; and as for mutual information."""
    rows = [{"begun": ["the cat", "the dog"], "answer": i % 2, "rest": "is here"} for i in range(4)]
    beginnings = make(
        "beginnings",
        rows,
        output_type="multiple_choice",
        doc_to_text="answer",
        doc_to_choice="begun",
        doc_to_target="rest",
        metric_list=[ACCURACY],
    )
    got = scores(*testbed, honesty, beginnings, [1.0])
    expected = torch.stack(by_hand(testbed, honesty, [Item(text, (" is here",)) for text in rows[0]["begun"]], 1.0))
    assert got.answers.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(got.log_likelihoods[0], expected.T.repeat(4, 1), atol=1e-4)


def test_likelihoods_without_the_question_are_no_choices(testbed, honesty, choosing):
    mutual = choosing | {"metric_list": [ACCURACY, {**ACCURACY, "metric": "acc_mutual_info"}]}
    expected = scores(*testbed, honesty, choosing, [1.0], apply_chat_template=True)
    got = scores(*testbed, honesty, mutual, [1.0], apply_chat_template=True)
    assert got.answers.tolist() == expected.answers.tolist()
    np.testing.assert_allclose(got.log_likelihoods, expected.log_likelihoods, atol=1e-4)


def test_scores_of_another_type_are_refused(testbed, honesty, asking):
    with pytest.raises(ValueError, match="and 'asking' is generate_until: use `evaluate`"):
        scores(*testbed, honesty, asking, ALPHAS)


@pytest.mark.parametrize("answers", [(0, 7), (0, -1), ("a", "none of them"), ([0], [0, 1])], ids=repr)
def test_a_document_without_a_single_right_choice_is_named_before_the_model_runs(
    testbed, honesty, make, answers, monkeypatch
):
    task = make(
        "odd",
        [{"question": "q", "options": ["a", "b"], "answer": answer} for answer in answers],
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="options",
        doc_to_target="answer",
        metric_list=[ACCURACY],
    )
    monkeypatch.setattr(AnswerFanout, "at", None)
    with pytest.raises(ValueError, match=r"document odd/. has no single right choice: .* of 2. Use `evaluate`"):
        scores(*testbed, honesty, task, ALPHAS)
    assert not repe.status(testbed[0])


def test_choices_are_told_by_number_or_by_name(testbed, honesty, choosing, make, skills):
    rows = [
        {"question": i.prompt[0]["content"], "options": i.options, "answer": i.options[i.answer]} for i in skills[:3]
    ]
    named = make("named", rows, **{k: v for k, v in choosing.items() if k.startswith(("output", "doc_to", "metric"))})
    assert scores(*testbed, honesty, named, [0.0]).answers.tolist() == [item.answer for item in skills[:3]]


# too long, and other mistakes


def test_contexts_that_are_too_long_lose_their_beginning_as_with_lm_eval(testbed, honesty, make):
    rows = [{"question": "the cat is here. " * n, "answer": " the dog"} for n in (2, 300)]
    metrics = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    task = make(
        "long", rows, output_type="loglikelihood", doc_to_text="question", doc_to_target="answer", metric_list=metrics
    )
    with pytest.warns(UserWarning, match="1 contexts are too long for 512 tokens"):
        (row,) = evaluate(*testbed, honesty, task, [1.0], scope="all")
    expected = plain_harness(testbed, honesty, task, 1.0)["results"]["long"]["perplexity,none"]
    assert row["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [0, 9])
def test_a_continuation_of_no_tokens_or_too_many_is_refused(count):
    with pytest.raises(ValueError, match=f"a continuation has {count} tokens, and the model reads 1 to 8"):
        harness.answer_of([1, 2], [3] * count, 8)


def test_a_request_is_an_answer_that_loses_the_first_tokens_of_its_context():
    assert harness.answer_of([1, 2], [3, 4], 8) == Answer((1, 2, 3, 4), 2)
    assert harness.answer_of([1, 2, 3], [4, 5], 3) == Answer((2, 3, 4, 5), 2)


@pytest.mark.parametrize(("alphas", "how"), [([], {}), ([np.nan], {}), ([1.0], {"scope": torch.ones(1, 1) > 0})])
def test_what_cannot_be_swept_is_refused(testbed, honesty, choosing, alphas, how):
    for measure in (scores, evaluate):
        with pytest.raises(ValueError, match=r"at least one finite number|no scope for many"):
            measure(*testbed, honesty, choosing, alphas, **how)


def test_a_model_that_is_not_causal_is_refused(tokenizer, honesty, choosing):
    with pytest.raises(ValueError, match="need a causal language model"):
        scores(zoo.build("t5"), tokenizer, honesty, choosing, ALPHAS)


# what stays as it was


def state(model, tokenizer):
    kept = {name: (parameter.data_ptr(), parameter.sum().item()) for name, parameter in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    texts = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template, len(tokenizer), repr(tokenizer))
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    return kept, hooks, model.training, vars(model).keys(), model.generation_config.to_dict(), texts, draws


def test_nothing_that_is_passed_in_is_changed(choosing, asking):
    """Not even a model in training, of untied weights that its config says are tied, and a tokenizer that pads none."""
    model, tokenizer = zoo.build("llama"), zoo.tokenizer(pad=False)
    model.config.tie_word_embeddings = True
    tokenizer.padding_side = "right"
    model.train()
    old = choosing | {"dataset_kwargs": choosing["dataset_kwargs"] | {"trust_remote_code": True}}
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    tasks = [old, asking]
    before, asked = state(model, tokenizer), copy.deepcopy(tasks)
    evaluate(model, tokenizer, plain_vector(model), tasks, ALPHAS)
    assert state(model, tokenizer) == before
    assert tasks == asked


def test_a_model_in_training_is_measured_without_dropout(tokenizer, choosing):
    model = zoo.build("llama")
    vector = plain_vector(model)
    expected = scores(model, tokenizer, vector, choosing, ALPHAS)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.9
    assert scores(model.train(), tokenizer, vector, choosing, ALPHAS) == expected


def test_a_failure_leaves_nothing_attached(testbed, honesty, choosing, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFanout, "at", fail)
    for measure in (scores, evaluate):
        with pytest.raises(KeyboardInterrupt):
            measure(*testbed, honesty, choosing, ALPHAS)
        assert not repe.status(testbed[0])


def test_nothing_is_printed_and_nothing_logged(testbed, honesty, choosing, asking, rolling, capsys, caplog):
    evaluate(*testbed, honesty, [choosing, asking, rolling], [1.0], apply_chat_template=True)
    assert capsys.readouterr().out == ""
    assert not caplog.records


# lm-eval itself


def test_without_lm_eval_it_says_what_to_install(testbed, honesty, choosing, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    for measure in (scores, evaluate):
        with pytest.raises(ImportError, match=r"pip install 'repe-torch\[eval\]'"):
            measure(*testbed, honesty, choosing, ALPHAS)


def test_lm_eval_is_loaded_when_it_is_used():
    asked = "[name for name in ('lm_eval', 'datasets') if name in sys.modules]"
    code = f"import sys, repe.measuring.harness; print(*{asked})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
