"""Runs in the environment of other libraries, and imports nothing of this one: extracts whenever a line comes in.

    python -P peer_worker.py {repeng|steering_vectors|repe_official} FOLDER

Every library extracts at all blocks that it would by its own example, since none can be told to stop early.
"""

import contextlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

BATCH = 32


def main(name, folder):
    asked = json.loads((Path(folder) / "workload.json").read_text())
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            release, extract = prepared(name, folder, asked)
    except Exception as error:
        say(missing=f"{type(error).__name__}: {error}")
        return
    say(ready=release)
    for _ in sys.stdin:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            extract()
        say(done=True)


def say(**words):
    print(json.dumps(words), file=sys.__stdout__, flush=True)


def prepared(name, folder, asked):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return LIBRARIES[name](model, tokenizer, [tuple(pair) for pair in asked["pairs"]], asked["blocks"])


def repeng(model, tokenizer, pairs, blocks):
    from repeng import ControlModel, ControlVector, DatasetEntry

    wrapped = ControlModel(model, blocks)
    entries = [DatasetEntry(*pair) for pair in pairs]
    return f"repeng {version('repeng')}", lambda: ControlVector.train(wrapped, tokenizer, entries, batch_size=BATCH)


def steering_vectors(model, tokenizer, pairs, blocks):
    from steering_vectors import train_steering_vector

    def extract():
        train_steering_vector(model, tokenizer, pairs, layers=blocks, batch_size=BATCH, show_progress=False)

    return f"steering-vectors {version('steering-vectors')}", extract


def repe_official(model, tokenizer, pairs, blocks):
    import torch
    from transformers import pipeline

    from repe import repe_pipeline_registry

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # it asks for a GPU by name
    repe_pipeline_registry()
    reading = pipeline("rep-reading", model=model, tokenizer=tokenizer)
    count = model.config.num_hidden_layers

    def extract():
        reading.get_directions(
            [text for pair in pairs for text in pair], rep_token=-1, hidden_layers=[block - count for block in blocks],
            n_difference=1, train_labels=[[True, False]] * len(pairs), direction_method="pca", batch_size=BATCH,
        )  # fmt: skip

    return f"RepE's own {version('repe')}", extract


LIBRARIES = {library.__name__: library for library in (repeng, steering_vectors, repe_official)}

if __name__ == "__main__":
    main(*sys.argv[1:])
