"""Loading: one call for every kind of model, and nothing wrapped."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import repe
from repe.models.load import home_of, load_tokenizer
from tests import zoo


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("t5", "T5ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("mamba", "MambaForCausalLM"),
    ],
)
def test_a_local_folder_is_loaded_as_what_it_writes_with(tmp_path, name, kind):
    zoo.build(name).train().save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = repe.load(tmp_path)
    assert type(model).__name__ == kind
    assert not model.training
    assert tokenizer("ab")["input_ids"] == zoo.tokenizer()("ab")["input_ids"]


def test_an_encoder_is_loaded_without_a_head(tmp_path):
    zoo.build("bert").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    assert type(repe.load(tmp_path)[0]).__name__ == "BertModel"


def test_options_go_to_transformers(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    assert repe.load(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        repe.load(tmp_path / "missing")


def test_without_a_name_it_is_the_testbed(testbed):
    model, tokenizer = testbed
    assert model.config.num_hidden_layers == 6
    assert tokenizer.chat_template
    own = {name for name, text in repe.concepts(model).items() if repe.concepts()[name] != text}
    assert own == {"honesty", "harmfulness", "happiness"}
    assert all(len(description) > 20 for description in repe.concepts(model).values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration"), ("bert", "BertModel"),
     ("llava", "LlavaForConditionalGeneration")],
)  # fmt: skip
def test_a_config_that_names_no_architecture_still_has_a_head(tmp_path, name, kind):
    zoo.build(name).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    assert type(repe.load(tmp_path)[0]).__name__ == kind


def test_where_files_come_from_holds_for_all_of_them(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "inner")
    zoo.tokenizer().save_pretrained(tmp_path / "inner")
    model, tokenizer = repe.load(tmp_path, subfolder="inner")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer("ab")["input_ids"] == zoo.tokenizer()("ab")["input_ids"]


def test_hub_options_reach_config_model_and_tokenizer(monkeypatch):
    calls = []

    def stop_after(kind, result):
        def called(path, **options):
            calls.append((kind, path, options))
            return result

        return called

    model = zoo.build("llama")
    loaded = model, {"missing_keys": []}
    for name, result in (("AutoConfig", model.config), ("AutoModelForCausalLM", loaded), ("AutoTokenizer", None)):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", stop_after(name, result))
    hub = {"revision": "v1", "token": "t", "trust_remote_code": True, "cache_dir": "c"}
    repe.load("some/name", dtype="auto", **hub)
    assert calls == [
        ("AutoConfig", "some/name", hub),
        ("AutoModelForCausalLM", "some/name", {**hub, "dtype": "auto", "output_loading_info": True}),
        ("AutoTokenizer", "some/name", hub),
    ]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_weights_that_are_missing_are_an_error_unless_asked_for(tmp_path, family):
    """Every family's own files are whole; one matrix less, or other files in their place, is told."""
    zoo.tokenizer().save_pretrained(tmp_path)
    zoo.build(family).save_pretrained(tmp_path)
    repe.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name, tensor in weights.items() if ".1." in name and tensor.ndim > 1)]
    told = r"lacks \d+ of the weights of a .*allow_missing=True|weights of .* are missing, or of other shapes"
    for left in (weights, {"direction": torch.zeros(3)}):
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=told):
            repe.load(tmp_path)
    assert repe.load(tmp_path, allow_missing=True)


@pytest.mark.parametrize("given", [None, False])
def test_a_model_s_own_code_is_not_run_nor_asked_about(tmp_path, monkeypatch, given):
    zoo.build("llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    asked = [] if given is None else [("trust_remote_code", given)]
    for name in ("config.json", "tokenizer_config.json"):
        before = (tmp_path / name).read_text()
        data = json.loads(before) | {"auto_map": own, "tokenizer_class": "T", "model_type": "its own"}
        (tmp_path / name).write_text(json.dumps(data))
        for load in (repe.load, load_tokenizer):
            monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
            if load is repe.load or name == "tokenizer_config.json":
                with pytest.raises(ValueError, match="trust_remote_code=True"):
                    load(tmp_path, **dict(asked))
        (tmp_path / name).write_text(before)
    assert not (tmp_path / "ran").exists()


def test_concepts_beside_a_relative_folder_are_found(tmp_path, monkeypatch):
    zoo.build("llama").save_pretrained(tmp_path / "m")
    zoo.tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "concepts").mkdir()
    (tmp_path / "m" / "concepts" / "tone.jsonl").write_text(json.dumps({"positive": "a", "negative": "b"}))
    monkeypatch.chdir(tmp_path)
    model, _ = repe.load("m")
    monkeypatch.chdir("/")
    assert set(repe.concepts(model)) == {"tone", *repe.concepts()}


def test_a_model_s_home_is_the_folder_that_it_was_loaded_from_whatever_is_around_it(tmp_path, monkeypatch):
    zoo.build("llama").save_pretrained(tmp_path / "gpt2")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert home_of(model) == home_of(torch.nn.Sequential(model)) == tmp_path / "gpt2"
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", str(tmp_path / "missing"), ""):  # a name on the hub is no folder of the working directory
        model.config._name_or_path = name
        assert home_of(model) is None
    assert home_of(torch.nn.Linear(2, 2)) is None
    assert home_of(None) is None
