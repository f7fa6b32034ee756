"""Runs in the environment of other libraries, and imports nothing of this one: extracts whenever a line comes in.

    python -I peer_worker.py {repeng|repeng_pca_center|steering_vectors|repe_official} FOLDER

Every library extracts at all blocks that it would by its own example, since none can be told to stop early. NAME.npz in
the folder then holds the directions, which each adds to the output of the block of that number, counted from 0.
"""

import contextlib
import json
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

BATCH = 32
ALIKE = 1e-3  # nats that the loss of the same model may be off


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
            directions = extract()
        np.savez(Path(folder) / f"{name}.npz", **{str(block): direction for block, direction in directions.items()})
        say(done=True)


def say(**words):
    print(json.dumps(words), file=sys.__stdout__, flush=True)


def prepared(name, folder, asked):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check(model, tokenizer, asked)
    return LIBRARIES[name](model, tokenizer, [tuple(pair) for pair in asked["pairs"]], asked["blocks"])


def check(model, tokenizer, asked):
    import torch

    ids = tokenizer(asked["pairs"][0][0])["input_ids"]
    if ids != asked["ids"]:
        raise ValueError(f"its tokenizer reads {ids}, where it should read {asked['ids']}")
    with torch.no_grad():
        loss = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    if not abs(loss - asked["loss"]) < ALIKE:
        raise ValueError(f"its model has a loss of {loss:g}, where it should have {asked['loss']:g}")


def repeng(model, tokenizer, pairs, blocks, method="pca_diff"):
    from repeng import ControlModel, ControlVector, DatasetEntry

    wrapped = ControlModel(model, blocks)
    entries = [DatasetEntry(*pair) for pair in pairs]

    def extract():
        return ControlVector.train(wrapped, tokenizer, entries, batch_size=BATCH, method=method).directions

    return f"repeng {version('repeng')} {method}", extract


def steering_vectors(model, tokenizer, pairs, blocks):
    from steering_vectors import train_steering_vector

    def extract():
        found = train_steering_vector(model, tokenizer, pairs, layers=blocks, batch_size=BATCH, show_progress=False)
        return found.layer_activations

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
        found = reading.get_directions(
            [text for pair in pairs for text in pair], rep_token=-1, hidden_layers=[block - count for block in blocks],
            n_difference=1, train_labels=[[True, False]] * len(pairs), direction_method="pca", batch_size=BATCH,
        )  # fmt: skip
        signed = ((layer, found.direction_signs[layer][0] * found.directions[layer][0]) for layer in found.directions)
        return {count + layer: direction for layer, direction in signed}

    return f"RepE's own {version('repe')}", extract


LIBRARIES = {library.__name__: library for library in (repeng, steering_vectors, repe_official)}
LIBRARIES["repeng_pca_center"] = partial(repeng, method="pca_center")

if __name__ == "__main__":
    main(*sys.argv[1:])
