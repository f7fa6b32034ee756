"""Extracts the shipped vectors anew: `python -m repe.testbed.vectors`, or `... smollm2 [CONCEPT ...]` for SmolLM2's."""

import sys

import repe
from repe.models.fingerprint import fingerprint
from repe.reading.extract import ENOUGH
from repe.reading.store import location, shipped_folder
from repe.testbed import FOLDER


def main() -> None:
    name, asked = next(iter(sys.argv[1:]), None), sys.argv[2:]
    model, tokenizer = repe.load(name)
    there_are = sorted(repe.concepts() if name else (path.stem for path in (FOLDER / "concepts").iterdir()))
    for concept in asked or there_are:
        vector = repe.extract(model, tokenizer, concept, enough=ENOUGH if name else None)
        path = vector.save(location(shipped_folder(), fingerprint(model), concept))
        print(vector, vector.provenance["chosen_by"], path, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
