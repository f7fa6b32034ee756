"""Extracts the testbed's shipped vectors anew: `python -m repe.testbed.vectors`."""

from collections.abc import Iterable
from typing import Any

import repe
from repe.models.fingerprint import fingerprint
from repe.reading.store import location, shipped_folder
from repe.testbed import FOLDER


def main() -> None:
    ship(*repe.load(), sorted(path.stem for path in (FOLDER / "concepts").iterdir()), enough=None)


def ship(model: Any, tokenizer: Any, concepts: Iterable[str], **how: Any) -> None:
    """Extract concepts as `repe.extract` does, and keep the vectors among those that are shipped."""
    for concept in concepts:
        vector = repe.extract(model, tokenizer, concept, **how)
        path = vector.save(location(shipped_folder(), fingerprint(model), concept))
        print(vector, vector.provenance["chosen_by"], path, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
