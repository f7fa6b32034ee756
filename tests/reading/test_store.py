"""Concepts by name: shipped, else cached, else extracted once."""

import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from repe.data import catalogue
from repe.models.files import OLD, draft_of
from repe.models.fingerprint import fingerprint
from repe.models.load import home_of
from repe.reading import extract as extraction
from repe.reading import store
from repe.reading.vector import ConceptVector
from tests import oracles, zoo

NAME = "politeness"


@pytest.fixture
def home(tmp_path):
    """A folder as `from_pretrained` knows it, with a concept beside the weights."""
    home = tmp_path / "model"
    zoo.build("llama").save_pretrained(home)
    write_pairs(home / "concepts" / f"{NAME}.jsonl")
    return home


def write_pairs(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"positive": f"{word} please", "negative": f"{word} now!", "item": word} for word in "abcdefgh"]
    path.write_text("\n".join(map(json.dumps, lines)))


def load(home: Path, **options) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(home, **options).eval()


@pytest.fixture
def model(home):
    return load(home)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of shipped vectors, empty."""
    monkeypatch.setattr(store, "shipped_folder", lambda: tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture(autouse=True)
def _nothing_shipped(shipped):
    return shipped


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def extractions(monkeypatch):
    """The calls of `extract`."""
    calls, extract = [], extraction.extract

    def counted(*args, **kwargs):
        calls.append(args)
        return extract(*args, **{**kwargs, "progress": False})

    monkeypatch.setattr(extraction, "extract", counted)
    return calls


def made_for(model: nn.Module, seed: int) -> ConceptVector:
    v = oracles.vector(seed)
    return ConceptVector(**{**vars(v), "provenance": {"fingerprint": fingerprint(model), "model": f"model {seed}"}})


def put(vector: ConceptVector, folder: Path, model: nn.Module, name: str = NAME) -> Path:
    return vector.save(store.location(folder, fingerprint(model), name))


def changed(model: nn.Module, relative: float) -> nn.Module:
    """The same model, trained a little further, as far as its numbers tell."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + relative * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    return model


# by name


def test_an_offloaded_model_finds_what_was_cached_for_it(home, extractions):
    offloaded = [accelerate.cpu_offload(load(home), execution_device=torch.device("cpu")) for _ in range(2)]
    for model in offloaded:
        store.resolve(model, NAME, zoo.tokenizer())
    assert len(extractions) == 1
    other = accelerate.cpu_offload(changed(load(home), 0.01), execution_device=torch.device("cpu"))
    assert not torch.equal(store.resolve(other, NAME, zoo.tokenizer()).write, store.resolve(offloaded[0], NAME).write)
    assert len(extractions) == 2


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # peft's own
def test_whose_vector_is_found_is_said_by_the_adapter_that_acts(model, extractions):
    """Each is as if there were no other."""
    for seed, name in enumerate(["one", "two"]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        model.add_adapter(config, name)

    def found() -> list[torch.Tensor]:
        vectors = []
        for name in ("one", "two", None):
            model.set_adapter(name) if name else model.disable_adapters()
            vectors.append(store.resolve(model, NAME, zoo.tokenizer()).write)
            model.enable_adapters()
        return vectors

    first, again = found(), found()
    assert len(extractions) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain = store.resolve(load(home_of(model)), NAME).write
    assert torch.equal(first[2], plain)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_a_concept_is_extracted_once_and_cached(model, cache, extractions):
    first = store.resolve(model, NAME, zoo.tokenizer())
    assert (len(extractions), first.concept) == (1, NAME)
    again = store.resolve(model, NAME)
    assert len(extractions) == 1
    assert torch.equal(again.write, first.write)
    assert again.provenance == first.provenance
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [f"{NAME}.safetensors"]


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to("nowhere"), os.mkfifo], ids=["folder", "link", "pipe"]
)
@pytest.mark.filterwarnings("ignore:.*could not be cached")
def test_what_is_no_file_and_is_named_like_a_vector_stops_nobody(model, cache, extractions, make):
    path = store.location(cache, fingerprint(model), NAME)
    path.parent.mkdir(parents=True)
    make(path)
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == NAME
    assert len(extractions) == 1


def test_folders_of_the_environment_may_begin_with_the_home(model, extractions, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REPE_CACHE", "~/kept")
    store.resolve(model, NAME, zoo.tokenizer())
    assert (tmp_path / "home" / "kept").is_dir()
    monkeypatch.setenv("REPE_VECTORS", "~/kept")
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "other"))
    store.resolve(model, NAME)
    assert len(extractions) == 1


def test_drafts_of_killed_runs_are_cleared_once_they_are_old(tmp_path):
    target, names = tmp_path / "v", [".v.repe-draft-old", ".v.repe-draft-new", ".w.repe-draft-old", ".v.yours"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "v").write_text("half")
        age = 0 if name.endswith("new") else 2 * OLD
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with draft_of(target) as draft:
        draft.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"v", *names[1:]}


def test_the_cache_serves_the_model_in_other_dtypes(home, model, extractions):
    store.resolve(model, NAME, zoo.tokenizer())
    store.resolve(load(home, dtype=torch.bfloat16), NAME)
    assert len(extractions) == 1


def test_models_of_one_shape_do_not_drive_each_other_out_of_the_cache(home, extractions):
    models = [load(home), changed(load(home), 0.05)]
    for model in (*models, *models):
        store.resolve(model, NAME, zoo.tokenizer())
    assert len(extractions) == 2


def test_shipped_comes_before_named_folders_and_these_before_the_cache(model, shipped, cache, tmp_path, monkeypatch):
    folders = [cache, tmp_path / "second", tmp_path / "first", shipped]
    monkeypatch.setenv("REPE_VECTORS", os.pathsep.join(map(str, folders[2:0:-1])))
    for seed, folder in enumerate(folders):
        put(made_for(model, seed), folder, model)
        assert store.resolve(model, NAME).concept == f"concept {seed}"


def test_a_vector_of_other_weights_is_not_used(home, model, cache, extractions):
    other = changed(load(home), 1e-2)
    foreign, unsigned = made_for(other, 1), oracles.vector(2)
    put(foreign, cache, model)
    with pytest.raises(ValueError, match="no vector of 'politeness' is stored for this model"):
        store.resolve(model, NAME)
    put(unsigned, cache, other)
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == NAME
    assert len(extractions) == 1


def test_a_changed_file_of_pairs_is_extracted_anew(home, model, extractions):
    old = store.resolve(model, NAME, zoo.tokenizer())
    path = home / "concepts" / f"{NAME}.jsonl"
    path.write_text(path.read_text().replace("please", "thanks"))
    with pytest.raises(ValueError, match="no vector of 'politeness' is stored for this model"):
        store.resolve(model, NAME)
    new = store.resolve(model, NAME, zoo.tokenizer())
    assert len(extractions) == 2
    assert not torch.equal(new.write, old.write)
    assert torch.equal(store.resolve(model, NAME).write, new.write)
    path.unlink()
    assert torch.equal(store.resolve(model, NAME).write, new.write)


@pytest.mark.parametrize("relative", [1e-2, 1.0])
def test_a_broken_file_of_other_weights_does_not_block_the_name(home, model, cache, extractions, relative):
    path = put(made_for(model, 1), cache, changed(load(home), relative))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"passed over: .*is not a whole concept vector") as caught:
        vector = store.resolve(model, NAME, zoo.tokenizer())
    assert str(path) in str(caught[0].message)
    assert (vector.concept, len(extractions)) == (NAME, 1)


def test_a_broken_file_in_the_cache_is_named(model, cache):
    path = put(made_for(model, 1), cache, model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole concept vector") as raised:
        store.resolve(model, NAME)
    assert str(path) in str(raised.value)


def test_a_vector_of_other_pairs_is_stale_in_the_cache_and_yours_in_your_folder(model, cache, tmp_path, monkeypatch):
    other = made_for(model, 1)
    other = replace(other, provenance={**other.provenance, "pairs_digest": "of other pairs"})
    put(other, cache, model)
    with pytest.raises(
        ValueError,
        match="is stored for this model, except one of other pairs than the concept's file now has: pass token",
    ):
        store.resolve(model, NAME)
    monkeypatch.setenv("REPE_VECTORS", str(tmp_path / "mine"))
    put(other, tmp_path / "mine", model)
    assert store.resolve(model, NAME).provenance["pairs_digest"] == "of other pairs"


def test_a_shipped_vector_of_other_pairs_is_passed_over(model, shipped, extractions):
    vector = made_for(model, 1)
    put(replace(vector, provenance={**vector.provenance, "pairs_digest": "of other pairs"}), shipped, model)
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == NAME
    assert len(extractions) == 1
    put(vector, shipped, model)
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == "concept 1"


def test_without_any_vector_none_of_other_pairs_is_spoken_of(model):
    with pytest.raises(ValueError, match="no vector of 'politeness' is stored for this model: pass tokenizer="):
        store.resolve(model, NAME)


def other_template():
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = "Otherwise. " + tokenizer.chat_template
    return tokenizer


def test_a_cached_vector_of_chats_rendered_otherwise_is_extracted_anew(model, extractions, monkeypatch):
    first = store.resolve(model, NAME, zoo.tokenizer())
    assert store.resolve(model, NAME, zoo.tokenizer()).provenance == first.provenance
    assert len(extractions) == 1
    second = store.resolve(model, NAME, other_template())
    assert len(extractions) == 2
    assert second.provenance["rendering"] != first.provenance["rendering"]
    assert store.resolve(model, NAME).provenance == second.provenance  # no tokenizer: it cannot be known
    monkeypatch.setattr(extraction, "VERSION", extraction.VERSION + 1)
    assert store.resolve(model, NAME, other_template()).provenance["rendering"] != second.provenance["rendering"]
    assert len(extractions) == 3


def test_a_rendering_is_known_without_a_template_and_a_vector_that_names_none_is_not_stale(model, cache, extractions):
    assert extraction.rendering_of(zoo.tokenizer(chat=False)) == extraction.rendering_of(object())
    put(made_for(model, 1), cache, model)
    for tokenizer in (zoo.tokenizer(), other_template(), zoo.tokenizer(chat=False)):
        assert store.resolve(model, NAME, tokenizer).concept == "concept 1"
    assert not extractions


def test_a_shipped_vector_is_stale_by_its_rendering_and_yours_never_is(
    model, shipped, tmp_path, monkeypatch, extractions
):
    vector = made_for(model, 1)
    vector = replace(vector, provenance={**vector.provenance, "rendering": "of another template"})
    put(vector, shipped, model)
    assert store.resolve(model, NAME).concept == "concept 1"
    monkeypatch.setenv("REPE_VECTORS", str(tmp_path / "mine"))
    put(replace(vector, concept="mine"), tmp_path / "mine", model)
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == "mine"
    monkeypatch.delenv("REPE_VECTORS")
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == NAME
    assert len(extractions) == 1


def test_a_name_is_resolved_without_reading_the_pairs_again(model, monkeypatch):
    store.resolve(model, NAME, zoo.tokenizer())
    store.resolve(model, NAME)
    monkeypatch.setattr("repe.data.files._read", lambda path: pytest.fail(f"{path} is read again"))
    monkeypatch.setattr(extraction, "digest_of", lambda pairs: pytest.fail("the pairs are digested again"))
    assert store.resolve(model, NAME).concept == NAME


def test_the_working_directory_is_never_read(model, tmp_path, monkeypatch, extractions):
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere, elsewhere / "vectors", elsewhere / "cache"):
        put(made_for(model, 1), folder, model)
        made_for(model, 1).save(folder / f"{NAME}.safetensors")
    write_pairs(elsewhere / "concepts" / "other.jsonl")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("REPE_VECTORS", "")
    assert store.resolve(model, NAME, zoo.tokenizer()).concept == NAME
    assert len(extractions) == 1
    nameless = zoo.build("llama")
    assert catalogue.concepts(nameless) == catalogue.concepts()
    with pytest.raises(ValueError, match=r"no concept is called 'other'\. There are \['confidence'.*\]; or give"):
        store.resolve(nameless, "other", zoo.tokenizer())


def test_without_a_tokenizer_nothing_is_extracted(model, home, extractions):
    with pytest.raises(ValueError, match="pass tokenizer= to extract it once from") as raised:
        store.resolve(model, NAME)
    assert str(home / "concepts" / f"{NAME}.jsonl") in str(raised.value)
    assert not extractions


def test_an_unknown_name_says_which_are_near(model):
    with pytest.raises(
        ValueError,
        match=r"no concept is called 'polite'\. Did you mean 'politeness' or 'formality'\? There are \[.*'poli",
    ):
        store.resolve(model, "polite", zoo.tokenizer())
    with pytest.raises(ValueError, match=r"no concept is called 'xyz'\. There are \[.*\]; or give contrast pairs"):
        store.resolve(model, "xyz")


@pytest.mark.parametrize("path", ["concepts/politeness.jsonl", "politeness.json", "/etc/politeness", "../politeness"])
def test_a_path_is_no_name(model, path, cache, extractions):
    with pytest.raises(ValueError, match="is the path of a file, and not the name of a concept: give the vector that"):
        store.resolve(model, path, zoo.tokenizer())
    assert not extractions
    assert not cache.exists()


def test_a_failure_while_caching_leaves_nothing_and_loses_nothing(model, cache, monkeypatch, extractions):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("repe.reading.vector.os.replace", full_disk)
    with pytest.warns(UserWarning, match=r"'politeness' could not be cached \(no space left on device\)"):
        vector = store.resolve(model, NAME, zoo.tokenizer())
    assert vector.concept == NAME
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_a_failure_while_extracting_caches_nothing(model, cache, monkeypatch):
    monkeypatch.setattr(extraction, "extract", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.resolve(model, NAME, zoo.tokenizer())
    assert not cache.exists()


def test_extraction_by_name_leaves_model_and_tokenizer_as_they_were(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokenizer = zoo.tokenizer(pad=False)
    store.resolve(model, NAME, tokenizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert tokenizer.pad_token is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("REPE_CACHE", str(tmp_path / "named"))
    assert store.cache_folder() == tmp_path / "named"
    monkeypatch.delenv("REPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "repe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "repe"


# whose vector it is


def test_a_vector_of_other_weights_warns(home, model):
    near = r"other weights, 0\.99\d near to these, where 1 is the same \(model 3\)"
    with pytest.warns(UserWarning, match=rf"the vector 'concept 3' was extracted from {near}"):
        store.warn_if_foreign(changed(load(home), 1e-2), made_for(model, 3))


def test_a_vector_of_these_weights_or_of_nobody_says_is_quiet(home, model):
    store.warn_if_foreign(model, made_for(model, 1))
    store.warn_if_foreign(load(home, dtype=torch.bfloat16), made_for(model, 1))
    store.warn_if_foreign(model, oracles.vector())


def test_a_file_that_calls_its_concept_otherwise_is_not_extracted(home, model, extractions):
    pairs = json.dumps({
        "concept": "good", "templates": [{"name": "t", "text": "{x}"}],
        "items": [{"name": n, "x": {"positive": f"{n} please", "negative": f"{n} now"}} for n in "abcdefgh"],
    })  # fmt: skip
    (home / "concepts" / "bad.json").write_text(pairs)
    with pytest.raises(ValueError, match=r"bad\.json: the concept in it is 'good', and the file's name says 'bad'"):
        store.resolve(model, "bad", zoo.tokenizer())
    assert not extractions


def test_a_vector_that_an_earlier_version_made_warns_that_it_cannot_be_compared(model):
    vector = replace(oracles.vector(), provenance={"fingerprint": {"key": "k", "sketch": {"w": [0.1]}}})
    with pytest.warns(UserWarning, match="cannot be compared with these, as another version of the library described"):
        store.warn_if_foreign(model, vector)


def test_a_vector_of_the_same_model_in_another_form_is_found_and_warns_of_nothing(home, model, extractions):
    vector = store.resolve(model, NAME, zoo.tokenizer())
    model.resize_token_embeddings(zoo.VOCABULARY + 8, mean_resizing=False)
    store.warn_if_foreign(model, vector)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.ndim > 1:
                step = p.abs().amax(-1, keepdim=True) / 7
                p.copy_((p / step).round() * step)
    store.warn_if_foreign(model, vector)
    assert store.resolve(model, NAME).digest == vector.digest
    assert len(extractions) == 1
