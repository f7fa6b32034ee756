"""GGUF files become ordinary models, kept in the cache; what is none is told, and nothing is lost."""

import json
import sys
from random import Random

import gguf
import numpy as np
import pytest
import torch

import repe
from repe.models import gguf as files
from repe.models import keeping
from repe.models.cache import models_folder
from repe.models.load import home_of, load_tokenizer
from repe.reading.extract import name_of
from tests import ggufs, zoo

IDS = torch.tensor([[9, 17, 30, 12, 44]])


@pytest.fixture
def original():
    return zoo.build("llama")


@pytest.fixture
def path(tmp_path, original):
    return ggufs.write(tmp_path / "toy.gguf", original)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("cache", [True, False])
def test_the_model_of_a_file_is_the_model_that_was_written_to_it(path, original, cache):
    model, tokenizer = repe.load(path, cache=cache)
    assert type(model) is type(original)
    assert (model.dtype, model.training) == (torch.float32, False)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"])[-2:] == ["ab", "c"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<user>a<end>"
    assert load_tokenizer(path)("abc")["input_ids"] == tokenizer("abc")["input_ids"]


@pytest.mark.parametrize("cache", [True, False])
def test_nothing_of_the_quantiser_is_left(tmp_path, original, cache):
    model, tokenizer = repe.load(ggufs.write(tmp_path / "toy.gguf", original, "Q8_0"), cache=cache)
    for holder in (model, model.config, *model.modules()):
        assert not {"hf_quantizer", "quantization_config", "quantization_method", "is_quantized", "_is_quantized"} & {
            *vars(holder), *vars(getattr(holder, "config", model.config))
        }  # fmt: skip
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(repe.load(tmp_path / "saved")[0]), logits(model))
    assert model.to(torch.float16).dtype == torch.float16  # what transformers refuses of a quantised one
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_weights_are_what_the_package_dequantises(tmp_path, original, kind):
    model, _ = repe.load(ggufs.write(tmp_path / "toy.gguf", original, kind))
    weight, quantised = original.model.layers[1].mlp.up_proj.weight.detach().numpy(), gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(weight, quantised), quantised)
    assert np.array_equal(model.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)


def test_from_the_cache_it_is_the_same_and_the_file_is_read_once(path, monkeypatch):
    first, tokenizer = repe.load(path)
    monkeypatch.setattr(keeping, "read_model", None)
    again, same = repe.load(path)
    assert torch.equal(logits(first), logits(again))
    assert tokenizer.get_vocab() == same.get_vocab()
    assert tokenizer.chat_template == same.chat_template
    (folder,) = models_folder().iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def test_the_cache_goes_by_what_a_file_holds(path, tmp_path, original, monkeypatch):
    repe.load(path)
    with torch.no_grad():
        original.model.norm.weight.mul_(2)
    ggufs.write(path, original)
    assert torch.equal(repe.load(path)[0].model.norm.weight, original.model.norm.weight)
    moved, n_kept = path.rename(tmp_path / "moved.gguf"), 2
    for version in (keeping.transformers.__version__, "another"):
        monkeypatch.setattr(keeping.transformers, "__version__", version)
        assert name_of(repe.load(moved)[0]) == "moved"
        assert len([*models_folder().iterdir()]) == n_kept
        n_kept += 1


def test_the_cache_is_kept_where_it_is_allowed(path, monkeypatch):
    repe.load(path, cache=False)
    monkeypatch.setattr(keeping, "LARGEST", path.stat().st_size - 1)
    repe.load(path)
    assert not models_folder().exists()
    repe.load(path, cache=True)
    assert models_folder().exists()


def test_a_cache_that_cannot_be_written_is_a_warning(path, original, monkeypatch, tmp_path):
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "no-folder"))
    with pytest.warns(UserWarning, match=r"toy.gguf could not be kept .* name a folder .* in REPE_CACHE"):
        model, _ = repe.load(path)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)


def test_what_breaks_off_leaves_no_half_of_a_model(path, monkeypatch):
    def break_off(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", break_off)
    with pytest.raises(KeyboardInterrupt):
        repe.load(path)
    assert [*models_folder().iterdir()] == []


@pytest.mark.parametrize("cache", [True, False])
def test_options_hold_for_the_model_of_a_file(path, cache):
    model, _ = repe.load(path, cache=cache, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_file_in_a_folder_is_the_file(path, tmp_path, monkeypatch):
    expected = logits(repe.load(path)[0])
    monkeypatch.chdir(tmp_path)
    for model, _ in (repe.load(tmp_path, gguf_file="toy.gguf"), repe.load("toy.gguf")):
        assert torch.equal(logits(model), expected)
        monkeypatch.chdir("/")
        assert home_of(model) == tmp_path
        assert name_of(model) == "toy"
        monkeypatch.chdir(tmp_path)


def test_concepts_beside_a_file_are_found_and_the_cache_is_named_nowhere(path, tmp_path):
    (tmp_path / "concepts").mkdir()
    lines = [{"positive": f"{c} now", "negative": f"{c} not", "item": c} for c in "abcdefgh"]
    (tmp_path / "concepts" / "tone.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for cache in (True, False):
        model, tokenizer = repe.load(path, cache=cache)
        assert "tone" in repe.concepts(model)
        vector = repe.extract(model, tokenizer, "tone")
        assert vector.provenance["model"] == "toy"
        assert str(models_folder()) not in json.dumps(vector.provenance) + str(model.config) + tokenizer.name_or_path


# what is no model


def test_two_files_are_an_error(path):
    with pytest.raises(ValueError, match=r"got '.*toy.gguf' and gguf_file='b.gguf', which name a model each"):
        repe.load(path, gguf_file="b.gguf")
    with pytest.raises(ValueError, match=r"got 'smollm2' and gguf_file='b.gguf'"):
        repe.load("smollm2", gguf_file="b.gguf")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no GGUF file .*none.gguf"):
        repe.load(tmp_path / "none.gguf")
    with pytest.raises(OSError, match=r"none.gguf"):
        repe.load(tmp_path, gguf_file="none.gguf")


def test_an_architecture_that_cannot_be_read_is_named(tmp_path, original):
    path = ggufs.write(tmp_path / "toy.gguf", original, architecture="rwkv9")
    for load in (repe.load, load_tokenizer):
        with pytest.raises(ValueError, match=r"toy.gguf cannot be read: it holds a model of the architecture 'rwkv9'"):
            load(path)
    assert not models_folder().exists()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.05, 0.3, 0.9, 0.9999])
def test_a_file_cut_short_is_told_and_left_as_it_is(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"toy.gguf is (cut short: it has [\d,]+ bytes of|no whole GGUF file)"):
        repe.load(path)
    assert path.read_bytes() == whole[: int(share * len(whole))]
    assert not models_folder().exists()


def test_what_only_ends_like_a_gguf_file_is_told(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"\x80\x02" * 99)
    with pytest.raises(ValueError, match=r"a.gguf is no whole GGUF file: it begins with .*, expected b'GGUF'"):
        repe.load(tmp_path / "a.gguf")


@pytest.mark.parametrize("architecture", ["controlvector", "llama"])
def test_a_control_vector_is_no_model(tmp_path, architecture):
    path = ggufs.write_control_vector(tmp_path / "a.gguf", architecture)
    with pytest.raises(ValueError, match=r"a.gguf holds no model, but a GGUF control vector: give the file of a model"):
        repe.load(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [({"general__type": "adapter"}, "holds no model, but a GGUF adapter"), ({"split__count": 3}, "is one of 3 files")],
)
def test_adapters_and_parts_are_no_models(tmp_path, original, metadata, said):
    with pytest.raises(ValueError, match=said):
        repe.load(ggufs.write(tmp_path / "a.gguf", original, **metadata))


def test_a_file_without_all_weights_is_told(tmp_path, original):
    path = ggufs.write(tmp_path / "a.gguf", original, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"lacks weights of a 'llama' model, such as model.layers.1.mlp.up_proj"):
        repe.load(path)


def test_a_model_is_no_vector(path, tmp_path):
    with pytest.raises(ValueError, match=r"not a whole concept vector: it is a GGUF model, which `repe.load` loads"):
        repe.ConceptVector.load(path)
    control = ggufs.write_control_vector(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="not a whole concept vector: it is a GGUF control vector, which is not read"):
        repe.ConceptVector.load(control)


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'repe-torch\[gguf\]'"):
        repe.load(path)


def test_a_kept_model_needs_no_package(path, monkeypatch):
    repe.load(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    assert repe.load(path)[0].dtype == torch.float32


def test_a_header_of_nonsense_is_told(path):
    whole, random = path.read_bytes(), Random(0)
    for at in range(4, 400, 7):  # a length of a text or a number of entries, among others
        path.write_bytes(whole[:at] + random.randbytes(8) + whole[at + 8 :])
        try:
            files.Header.of(path)
        except ValueError as error:
            assert "is no whole GGUF file" in str(error)  # noqa: PT017
