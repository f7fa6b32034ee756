"""Extracts the testbed's concepts anew, to where shipped vectors are kept: `python -m repe.testbed.vectors`."""

import repe
from repe.fingerprint import fingerprint
from repe.store import location, shipped_folder
from repe.testbed import SITES


def main() -> None:
    model, tokenizer = repe.load()
    for concept, site in SITES.items():
        vector = repe.extract(model, tokenizer, concept, site=site)
        print(vector, vector.save(location(shipped_folder(), fingerprint(model), concept)), sep="\n  ")


if __name__ == "__main__":
    main()
