"""Extracts SmolLM2's shipped vectors anew: `python -m repe.real.vectors [CONCEPT ...]`."""

import sys

import repe
from repe.testbed.vectors import ship

if __name__ == "__main__":
    ship(*repe.load("smollm2"), sys.argv[1:] or sorted(repe.concepts()))
