"""Extracts the testbed's concepts anew, to where shipped vectors are kept: `python -m repe.testbed.vectors`."""

import repe
from repe.models.fingerprint import fingerprint
from repe.reading.store import location, shipped_folder
from repe.testbed import FOLDER


def main() -> None:
    model, tokenizer = repe.load()
    for path in sorted((FOLDER / "concepts").iterdir()):
        vector = repe.extract(model, tokenizer, path)
        print(vector, vector.save(location(shipped_folder(), fingerprint(model), vector.concept)), sep="\n  ")


if __name__ == "__main__":
    main()
