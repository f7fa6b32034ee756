"""A conversation: whatever was said and however it was steered, an answer is that of a fresh one with the same text."""

import warnings

import pytest
import torch
import transformers

import repe
from repe.cli.conversation import Conversation, unmoved
from repe.models.blocks import find_stack
from repe.models.tokens import encode
from repe.steering.edit import Edit
from tests import zoo
from tests.chat_templates import TEMPLATES
from tests.oracles import plain_vector

QUESTIONS = ["hello there", "who is it", "and why"]
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SCOPES = ["all", "prompt", "generated", "answer", slice(-3, None), slice(2, None), (0, -1)]
LEAN = ["llama", "qwen3", "gpt2", "falcon", "gpt_neox", "opt", "phi3"]


def family(name):
    model = zoo.build(name)
    model.generation_config.eos_token_id = None  # so that every answer has its length
    return model


def talk_to(model, tokenizer, **more):
    return Conversation(model, tokenizer, **{**GREEDY, **more})


def fresh_answer(conversation, alphas, question):
    """What a model answers that has cached nothing, and was steered so from the start: logits and text."""
    model, tokenizer = conversation.model, conversation.tokenizer
    chat = [*conversation.messages, {"role": "user", "content": question}]
    handles = [repe.steer(model, edit, alpha) for edit, alpha in alphas]
    try:
        with first_logits(model) as seen:
            (answer,) = repe.generate(model, tokenizer, [chat], **conversation.options)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], answer


class first_logits:  # noqa: N801
    """The logits from which the first token of an answer was chosen."""

    def __init__(self, model):
        self.head, self.seen = model.get_output_embeddings(), []

    def __enter__(self):
        self.hook = self.head.register_forward_hook(lambda m, a, out: self.seen.append(out[0, -1].detach().clone()))
        return self.seen

    def __exit__(self, *_):
        self.hook.remove()


def assert_answers_like_a_fresh_one(conversation, question, alphas=()):
    logits, answer = fresh_answer(conversation, alphas, question)
    with first_logits(conversation.model) as seen:
        assert conversation.ask(question) == answer
    torch.testing.assert_close(seen[0], logits, atol=1e-3, rtol=1e-3)
    assert repe.status(conversation.model) == []


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_what_is_cached_changes_no_answer(name, tokenizer):
    conversation = talk_to(family(name), tokenizer)
    for question in QUESTIONS:
        assert_answers_like_a_fresh_one(conversation, question)


HYBRIDS = {  # what their caches hold besides keys and values: a few inputs of a convolution, or a recurrent state
    "Lfm2": {"layer_types": ["full_attention", "conv"] * 2},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 1, "use_mamba_kernels": False},
}


@pytest.mark.parametrize(("name", "reuses"), [("Lfm2", True), ("Jamba", False)])
def test_a_recurrent_state_is_rebuilt(name, reuses):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=zoo.VOCABULARY, num_key_value_heads=2, eos_token_id=None, **sizes, **HYBRIDS[name]
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(" | trim", "")
    unwritten = [*range(len(zoo.SPECIAL_TOKENS)), *range(len(tokenizer), zoo.VOCABULARY)]
    conversation = talk_to(model, tokenizer, suppress_tokens=unwritten)
    for question in QUESTIONS:  # every prompt goes on exactly where the cache ends
        assert_answers_like_a_fresh_one(conversation, question)
    assert (conversation.reused > 0) is reuses


def test_a_strength_of_0_is_none(tokenizer):
    model = family("llama")
    conversation = talk_to(model, tokenizer)
    conversation.ask(QUESTIONS[0])
    conversation.steer("axes", 0.0, plain_vector(model))
    assert (conversation.acting, conversation.outdated) == ((), 0)
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1])
    assert conversation.reused


@pytest.mark.parametrize("name", LEAN)
def test_a_turn_runs_only_its_new_tokens(name, tokenizer):
    model = family(name)
    conversation = talk_to(model, tokenizer)
    conversation.ask(QUESTIONS[0])
    before = len(encode(tokenizer, conversation.messages[:1])) + GREEDY["max_new_tokens"] - 1
    run = []
    hook = find_stack(model).blocks[0].register_forward_hook(lambda m, a, o: run.append(a[0].shape[1]))
    conversation.ask(QUESTIONS[1])
    hook.remove()
    whole = len(encode(tokenizer, conversation.messages[:3]))
    assert run[0] == conversation.read == whole - conversation.reused
    assert run[1:] == [1] * (GREEDY["max_new_tokens"] - 1)
    assert before - GREEDY["max_new_tokens"] <= conversation.reused <= before


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "mamba", "gpt2"])
def test_after_a_strength_changed_an_answer_is_of_that_strength_throughout(name, tokenizer):
    model = family(name)
    conversation, vector = talk_to(model, tokenizer), plain_vector(model)
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[0])
    for alpha in (9.0, 9.0, -9.0, 0.0):
        conversation.steer("axes", alpha, vector)
        for question in QUESTIONS[1:]:
            assert_answers_like_a_fresh_one(conversation, question, [(vector, alpha)] if alpha else [])


def test_without_rebuilding_the_answer_would_be_another(tokenizer):
    model = family("llama")
    conversation, vector = talk_to(model, tokenizer), plain_vector(model)
    conversation.ask(QUESTIONS[0])
    logits, _ = fresh_answer(conversation, [(vector, 9.0)], QUESTIONS[1])
    conversation.steer("axes", 9.0, vector)
    conversation._held_under = conversation._steered_by  # as if what is cached had been run under it
    with first_logits(model) as seen:
        conversation.ask(QUESTIONS[1])
    assert not torch.allclose(seen[0], logits, atol=0.1)


def test_several_concepts_act_together(tokenizer):
    model = family("llama")
    conversation, one = talk_to(model, tokenizer), plain_vector(model)
    other = repe.ConceptVector.random(one, 3)
    conversation.steer("one", 5.0, one)
    conversation.steer("other", -4.0, other)
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[0], [(one, 5.0), (other, -4.0)])
    conversation.steer("one", 2.0, one)
    assert conversation.outdated
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1], [(one, 2.0), (other, -4.0)])
    conversation.steer("one", 2.0, third := repe.ConceptVector.random(one, 4))  # another vector of the same name
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1], [(third, 2.0), (other, -4.0)])
    conversation.unsteer()
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[2])


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_in_every_scope_an_answer_is_that_of_a_fresh_conversation(scope, tokenizer):
    model = family("llama")
    conversation, edit = talk_to(model, tokenizer), Edit.of(plain_vector(model), scope=scope)
    conversation.steer("axes", 9.0, edit)
    for question in QUESTIONS:
        assert_answers_like_a_fresh_one(conversation, question, [(edit, 9.0)])


def test_of_several_scopes_the_one_that_changes_first_says_what_is_kept(tokenizer):
    model = family("llama")
    vector = plain_vector(model)
    edits = [(Edit.of(vector, scope=scope), 9.0) for scope in ("prompt", "answer")]
    conversation = talk_to(model, tokenizer)
    for edit, alpha in edits:
        conversation.steer(edit.scope, alpha, edit)
    for question in QUESTIONS:
        assert_answers_like_a_fresh_one(conversation, question, edits)


def test_what_a_scope_still_names_alike_is_kept():
    assert [unmoved(scope, 5, 9, 8) for scope in ("all", "prompt", "generated", "answer")] == [8, 5, 5, 4]
    assert [unmoved(scope, 5, 9, 8) for scope in (slice(1, 3), slice(-2, None), (0, -1), (0, 1))] == [8, 3, 4, 8]
    assert unmoved("prompt", 5, 9, 0) == 0


@pytest.mark.filterwarnings("ignore:the chat template of")
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_render_earlier_turns_otherwise_change_no_answer(template, tokenizer):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    model = family("llama")
    conversation, vector = Conversation(model, tokenizer, "Be frank.", **GREEDY), plain_vector(model)
    conversation.steer("axes", 4.0, vector)
    for question in QUESTIONS:
        assert_answers_like_a_fresh_one(conversation, question, [(vector, 4.0)])
    assert conversation.reused > 10


def test_only_what_a_template_renders_otherwise_is_run_again():
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATES["qwen3"]  # an answer is opened by thoughts, which it loses once it is over
    conversation = talk_to(family("llama"), tokenizer)
    conversation.ask(QUESTIONS[0])
    before = tokenizer.apply_chat_template(conversation.messages[:1], tokenize=True, return_dict=False)
    opened = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
    conversation.ask(QUESTIONS[1])
    assert conversation.reused == len(before) + opened


def test_what_was_said_may_be_changed(tokenizer):
    model = family("llama")
    conversation = talk_to(model, tokenizer)
    conversation.ask(QUESTIONS[0])
    conversation.messages[1]["content"] = "No."
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1])
    conversation.system = "Be brief."
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1])
    assert conversation.take_back() == QUESTIONS[1]
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1])  # whose prompt is cached to its end
    assert conversation.reused == len(encode(tokenizer, conversation.messages[:-1])) - 1
    conversation.take_back()
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[2])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[0])
    conversation.system = ""
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_an_answer_comes_in_pieces_and_is_kept_as_far_as_it_came(tokenizer):
    model = family("llama")
    conversation, pieces, asked = talk_to(model, tokenizer, max_new_tokens=40), [], []

    def stop():
        asked.append(1)
        return len(asked) == 9

    answer = conversation.ask(QUESTIONS[0], pieces.append, stop)
    assert answer == "".join(pieces)
    assert answer == fresh_answer(talk_to(model, tokenizer, max_new_tokens=9), [], QUESTIONS[0])[1]
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[1])
    assert conversation.reused


def test_an_answer_that_breaks_off_was_never_asked_for(tokenizer):
    model = family("llama")
    conversation, vector = talk_to(model, tokenizer, max_new_tokens=30), plain_vector(model)
    conversation.steer("axes", 3.0, vector)
    conversation.ask(QUESTIONS[0])
    said = list(conversation.messages)

    def breaks(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(QUESTIONS[1], breaks)
    assert conversation.messages == said
    assert repe.status(model) == []
    assert_answers_like_a_fresh_one(conversation, QUESTIONS[2], [(vector, 3.0)])


def test_what_cannot_be_steered_along_is_refused_at_once(tokenizer):
    model = family("llama")
    conversation, vector = talk_to(model, tokenizer), plain_vector(model)
    with pytest.raises(ValueError, match="must be finite"):
        conversation.steer("axes", float("nan"), vector)
    with pytest.raises(IndexError, match="Block 99 does not exist"):
        conversation.steer("axes", 1.0, Edit.of(vector, blocks=99))
    with pytest.raises(TypeError, match="expected a concept's name, a ConceptVector"):
        conversation.steer("axes", 1.0, "honesty")
    assert conversation.alphas == conversation.edits == {}
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        Conversation(zoo.build("t5"), tokenizer)


def test_trying_a_strength_warns_of_nothing(tokenizer):
    model = family("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        talk_to(model, tokenizer).steer("axes", 1.0, plain_vector(model))
    assert repe.status(model) == []
