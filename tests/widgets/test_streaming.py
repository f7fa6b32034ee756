"""Streaming: both texts are what the model writes alone, their figures are its own, and it is left as it was."""

import math
import threading
from itertools import pairwise

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import repe
from repe.models.tokens import encode
from repe.reading.capture import recording
from repe.reading.read import score
from repe.reading.store import resolve
from repe.widgets.streaming import Job, Line, Side, SideBySide, whole_words
from tests import oracles, zoo

QUESTION = [{"role": "user", "content": "Name the trade of Abrin Tolva."}]
SCENE = [{"role": "user", "content": "How does it go on? Greta brings a saddle to the school."}]
TEXT = "the quick brown fox"
GREEDY = {"do_sample": False}


@pytest.fixture
def honesty(testbed):
    return resolve(testbed[0], "honesty", testbed[1])


@pytest.fixture
def happiness(testbed):
    return resolve(testbed[0], "happiness", testbed[1])


def alone(model, tokenizer, text, tokens, *handles):
    """What the model writes in a batch of one, under handles that are made by the functions given."""
    opened = [make() for make in handles]
    try:
        return repe.generate(model, tokenizer, [text], max_new_tokens=tokens, **GREEDY)[0]
    finally:
        for handle in opened:
            handle.remove()


def hooks_of(model):
    return [
        (hooks, module.__dict__.get("forward"))
        for module in model.modules()
        for hooks in (dict(module._forward_hooks), dict(module._forward_pre_hooks))
    ]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 11)[None]).logits


# the texts


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_both_texts_are_what_the_model_writes_alone(family):
    model, tokenizer, vector = zoo.build(family), zoo.tokenizer(), oracles.vector()
    sides = SideBySide(model, tokenizer, [vector]).write(Job(TEXT, (9.0,), max_new_tokens=8))
    unsteered = alone(model, tokenizer, TEXT, 8)
    steered = alone(model, tokenizer, TEXT, 8, lambda: repe.steer(model, vector, 9.0))
    assert [side.text for side in sides] == [unsteered, steered]
    assert unsteered != steered


@pytest.mark.parametrize(
    ("edit", "scope"), [("add", "all"), ("add", "generated"), ("ablate", "prompt"), ("erase", "answer")]
)
@pytest.mark.parametrize("text", [QUESTION, SCENE, "Abrin Tolva"], ids=["question", "scene", "plain"])
def test_several_concepts_steer_at_once_as_several_handles_do(testbed, honesty, happiness, text, edit, scope):
    model, tokenizer = testbed
    job = Job(text, (-1.0, -0.7), {"edit": edit, "scope": scope}, 24)
    sides = SideBySide(model, tokenizer, [honesty, happiness]).write(job)
    handles = [
        lambda v=v, a=a: repe.steer(model, v, a, edit=edit, scope=scope)
        for v, a in ((honesty, -1.0), (happiness, -0.7))
    ]
    assert sides[0].text == alone(model, tokenizer, text, 24)
    assert sides[1].text == alone(model, tokenizer, text, 24, *handles)


def test_all_options_of_an_edit_go_to_steer(testbed, happiness):
    model, tokenizer = testbed
    how = {"blocks": [2, 3], "keep_norm": True}
    sides = SideBySide(model, tokenizer, [happiness]).write(Job(SCENE, (-1.5,), how))
    assert sides[1].text == alone(model, tokenizer, SCENE, 64, lambda: repe.steer(model, happiness, -1.5, **how))


def test_at_alpha_0_both_texts_are_the_same_and_cost_nothing(testbed, happiness):
    one, other = SideBySide(*testbed, [happiness]).write(Job(SCENE, (0.0,)))
    assert one.text == other.text
    assert other.kl == pytest.approx(0, abs=1e-6)
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
def test_a_model_inside_an_adapter_writes_as_it_does_alone():
    model, tokenizer, vector = zoo.build("llama"), zoo.tokenizer(), oracles.vector()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    sides = SideBySide(adapted, tokenizer, [vector]).write(Job(TEXT, (1.5,), max_new_tokens=6))
    assert sides[0].text == alone(adapted, tokenizer, TEXT, 6)
    assert sides[1].text == alone(adapted, tokenizer, TEXT, 6, lambda: repe.steer(adapted, vector, 1.5))


def test_a_model_in_training_mode_writes_what_it_writes_in_evaluation_mode(tokenizer):
    model, job = zoo.build("gpt2"), Job(TEXT, (1.5,), max_new_tokens=12)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    writer = SideBySide(model, tokenizer, [oracles.vector()])
    expected = [side.text for side in writer.write(job)]
    model.train()
    assert [side.text for side in writer.write(job)] == expected
    assert all(module.training for module in model.modules())


# as they grow


def test_what_is_shown_only_grows_token_by_token_and_at_once(testbed, happiness):
    seen = []
    final = SideBySide(*testbed, [happiness]).write(Job(SCENE, (-1.0,)), seen.append)
    for row in (0, 1):
        shown = [sides[row] for sides in seen]
        texts = ["".join(side.pieces[: side.whole]) for side in shown]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert texts[-1] == final[row].text
        assert len(set(texts)) > 5
        assert [len(side.pieces) for side in shown][:5] == [1, 2, 3, 4, 5]
        assert not any(side.ended for side in shown[:5])
    assert all(side.ended for side in final)


def spelled(ids, tokenizer):
    line = Line(tokenizer, 0, 0, set())
    for token in ids:
        line.add(torch.tensor([token]), torch.zeros(1, 256).log_softmax(-1), torch.zeros(1, 1))
        yield line


@given(st.text(max_size=12))
def test_no_character_is_ever_shown_in_part(text):
    for line in spelled(text.encode(), zoo.Bytes()):
        assert text.startswith(line.side.text)
    if text:
        line.end()
        assert (line.side.text, len(line.side.pieces)) == (text, len(text.encode()))


def test_a_character_that_was_cut_off_is_shown_as_it_is_decoded_in_the_end():
    *_, line = spelled("a€".encode()[:-1], zoo.Bytes())
    assert line.side.text == "a"
    line.end()
    assert line.side.pieces == ("a", "", zoo.Bytes().decode("€".encode()[:-1]))


def test_after_the_token_that_ends_it_a_text_takes_no_more():
    line, shown = Line(zoo.Bytes(), 0, 0, {ord(".")}), []
    for token in b"a.b":
        line.add(torch.tensor([token]), torch.zeros(1, 256).log_softmax(-1), torch.zeros(1, 1))
        shown.append((line.side.text, line.side.ended, len(line.side.divergence)))
    assert shown == [("a", False, 1), ("a.", True, 2), ("a.", True, 2)]


def test_a_decoder_that_changes_what_it_wrote_has_the_last_word():
    class Tidy(zoo.Bytes):
        def decode(self, ids, skip_special_tokens):
            return super().decode(ids, skip_special_tokens).replace(" .", ".")

    *_, line = spelled(b"so .", Tidy())
    line.end()
    assert line.side.text == "so."
    assert len(line.side.pieces) == 4


@given(st.lists(st.text("abö", min_size=1, max_size=9), max_size=6), st.text("abö", max_size=9))
def test_what_is_whole_are_the_words_before_the_last_space(words, last):
    text = " ".join([*words, last])
    assert text[: whole_words(text)] == " ".join(words)


@pytest.mark.parametrize("text", ["今日はいい", "a very" + "long" * 10])
def test_a_script_without_spaces_is_shown_as_it_comes(text):
    assert whole_words(text) == len(text)


# the figures


def test_the_figures_are_those_of_the_model_run_on_each_text(testbed, honesty, happiness):
    model, tokenizer = testbed
    vectors, alphas = (honesty, happiness), (0.3, -0.3)
    sides = SideBySide(model, tokenizer, vectors).write(Job(SCENE, alphas))
    assert sides[0].text != sides[1].text
    prompt = encode(tokenizer, SCENE)
    for side, strengths in zip(sides, ((0.0, 0.0), alphas), strict=True):
        written = [*tokenizer(side.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert len(written) == len(side.pieces)
        before, plain_scores = run(model, vectors, (0.0, 0.0), prompt, written)
        after, own_scores = run(model, vectors, strengths, prompt, written)
        divergence = (before.exp() * (before - after)).sum(-1)
        surprisal = -before.gather(-1, torch.tensor(written)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(side.divergence), divergence, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(side.surprisal), surprisal, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(side.unsteered_scores[:-1], plain_scores, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(side.scores[:-1], own_scores, atol=1e-3, rtol=1e-3)
        assert side.scores[-1].isnan().all()
        assert side.kl == pytest.approx(float(divergence.mean()), abs=1e-4)
        assert side.perplexity == pytest.approx(math.exp(float(surprisal.mean())), rel=1e-3)
    assert sides[0].divergence == (0.0,) * len(sides[0].pieces)
    assert sides[1].kl > 0.01
    assert (sides[1].scores - sides[1].unsteered_scores)[:-1].abs().max() > 0.3


def run(model, vectors, alphas, prompt, written):
    """In one forward: what the written tokens were chosen from, and the scores of all of them but the last."""
    handles = [repe.steer(model, v, a) for v, a in zip(vectors, alphas, strict=True)]
    places = [model.model.layers[v.recommended[0]] for v in vectors]
    try:
        with torch.no_grad(), recording(places, torch.clone) as records:
            out = model(torch.tensor([prompt + written]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    rows = [torch.tensor([v.row(v.recommended[0])]) for v in vectors]
    scores = [score(r[0, :, None], v, row)[:, 0] for r, v, row in zip(records, vectors, rows, strict=True)]
    begin = len(prompt)
    return out[begin - 1 : -1].log_softmax(-1), torch.stack(scores, -1)[begin:-1]


def test_figures_that_overflow_or_are_no_numbers_are_told_as_such():
    side = Side(("a",), torch.empty(0), torch.empty(0), (1e4,), (math.nan,), True)
    assert side.perplexity == math.inf
    assert math.isnan(side.kl)
    empty = Side()
    assert math.isnan(empty.perplexity)


def test_a_divergence_of_broken_logits_is_no_number():
    line = Line(zoo.Bytes(), 0, 1, set())
    line.add(torch.tensor([1, 1]), torch.tensor([[math.nan] * 4, [0.0] * 4]).log_softmax(-1), torch.zeros(2, 1))
    assert math.isnan(line.side.kl)


def test_what_a_token_has_no_chance_of_adds_nothing_to_the_divergence():
    line = Line(zoo.Bytes(), 0, 1, set())
    line.add(torch.tensor([1, 1]), torch.tensor([[0.0, 0.0, -math.inf]] * 2).log_softmax(-1), torch.zeros(2, 1))
    assert line.side.kl == 0


# the model afterwards


class OnPurposeError(Exception):
    pass


def fail(sides):
    raise OnPurposeError


def how_it_ends(writer, end):
    job = Job(SCENE, (-1.0,), {"scope": "generated"})
    if end == "whole":
        writer.write(job)
    elif end == "stopped":
        writer.write(job, is_stopped=lambda: True)
    elif end == "exception":
        with pytest.raises(OnPurposeError):
            writer.write(job, fail)
    else:
        with pytest.raises(IndexError):
            writer.write(Job(SCENE, (-1.0,), {"blocks": [99]}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("end", ["whole", "stopped", "exception", "refused"])
def test_the_model_is_as_it_was_to_the_last_bit(testbed, happiness, end, training):
    model, tokenizer = testbed
    model.train(training)
    try:
        before, hooks, attributes = logits(model), hooks_of(model), dict(vars(model))
        how_it_ends(SideBySide(model, tokenizer, [happiness]), end)
        assert repe.status(model) == []
        assert hooks_of(model) == hooks
        assert dict(vars(model)) == attributes
        assert model.training is training
        assert torch.equal(logits(model), before)
    finally:
        model.eval()


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_text_that_is_stopped_is_the_beginning_of_the_whole_and_says_so(testbed, happiness, calls):
    writer, job = SideBySide(*testbed, [happiness]), Job(SCENE, (-1.0,))
    whole, asked = writer.write(job), []

    def is_stopped():
        asked.append(1)
        return len(asked) > calls

    for side, full in zip(writer.write(job, is_stopped=is_stopped), whole, strict=True):
        assert len(side.pieces) <= calls < len(full.pieces)
        assert full.text.startswith(side.text)
        assert not side.ended


def test_two_that_write_on_one_model_do_not_steer_each_other(testbed, happiness):
    jobs = [Job(SCENE, (alpha,)) for alpha in (-1.0, 1.0)] * 2
    expected = [SideBySide(*testbed, [happiness]).write(job)[1] for job in jobs]
    found = [None] * len(jobs)

    def write(place):
        found[place] = SideBySide(*testbed, [happiness]).write(jobs[place])[1]

    threads = [threading.Thread(target=write, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(side.text, side.kl) for side in found] == [(side.text, side.kl) for side in expected]
    assert expected[0].text != expected[1].text


def test_what_another_thread_runs_meanwhile_is_plain_and_leaves_the_texts_as_they_are(testbed, happiness):
    model, _ = testbed
    job, plain, found = Job(SCENE, (-1.0,)), logits(model), []
    expected = SideBySide(*testbed, [happiness]).write(job)

    def use(_sides):
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()

    sides = SideBySide(*testbed, [happiness]).write(job, use)
    assert len(found) > 4
    assert all(torch.equal(other, plain) for other in found)
    for side, alone in zip(sides, expected, strict=True):
        assert (side.text, side.kl, side.surprisal) == (alone.text, alone.kl, alone.surprisal)
        assert torch.equal(side.scores.nan_to_num(), alone.scores.nan_to_num())


def test_who_waits_for_another_can_be_stopped(testbed, happiness):
    first, waiting, go_on = SideBySide(*testbed, [happiness]), threading.Event(), threading.Event()

    def hold(sides):
        waiting.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=first.write, args=(Job(SCENE, (1.0,)), hold))
    thread.start()
    assert waiting.wait(60)
    sides = SideBySide(*testbed, [happiness]).write(Job(SCENE, (1.0,)), is_stopped=lambda: True)
    assert [side.pieces for side in sides] == [(), ()]
    go_on.set()
    thread.join()


# what is refused


@pytest.mark.parametrize(("family", "message"), [("t5", "encoder-decoder"), ("bert", "not causal")])
def test_a_model_that_writes_no_text_from_left_to_right_is_refused(family, message):
    with pytest.raises(ValueError, match=message):
        SideBySide(zoo.build(family), zoo.tokenizer(), [oracles.vector()])


def test_a_model_without_generate_is_refused(tokenizer):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = zoo.build("llama")

    with pytest.raises(TypeError, match="no `generate`"):
        SideBySide(Wrapped(), tokenizer, [oracles.vector()])


def test_a_vector_of_another_model_is_refused(model, tokenizer, happiness):
    with pytest.raises(ValueError, match="extract it from this model"):
        SideBySide(model, tokenizer, [happiness])
