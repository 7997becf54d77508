# Everything runs from a clean checkout, without an activated environment.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTS ?= tests

.PHONY: help venv assets demo test test-full lint bench bench-peers clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED) ## create .venv and install dfc with its development tools

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard runtime/kernels/*.cpp runtime/kernels/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[hf,dev]'
	touch $@

assets: venv ## fetch the trained models that the tests use (into .assets, or DFC_ASSETS)
	$(BIN)/python -m tests.assets

demo: assets ## compile a trained sentence encoder and show what was gained
	$(BIN)/python examples/sentence_encoder.py

test: assets ## run the tests that a change must pass (TESTS=path for some of them)
	$(BIN)/python -m pytest -q -n 2 $(TESTS)

test-full: assets ## run the long tests that `make test` leaves out; writes docs/test-full.txt
	@mkdir -p docs
	@{ $(BIN)/python -c 'import os, platform as p, torch; print(f"python {p.python_version()}, torch {torch.__version__}, {p.system()} {p.machine()}, {os.cpu_count()} cores")'; \
	  $(BIN)/python -m pytest -q -n 2 -m "slow and not gpu" -ra --durations=15 $(TESTS); } 2>&1 \
	  | sed "s|$(CURDIR)|.|g" | tee docs/test-full.txt

lint: venv ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dfc

bench: assets ## run every benchmark
	@for script in benchmarks/[a-z]*.py; do \
	  test -e "$$script" || { echo "there is no benchmark yet"; exit 1; }; \
	  echo "== $$script"; $(BIN)/python "$$script"; \
	done

bench-peers: venv ## time other tools on the same rules and models (TVM and NNCF in .venv-peers)
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -q apache-tvm==0.27.0 nncf==3.4.0 openvino==2026.4.1
	$(BIN)/python benchmarks/rules.py --peers
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/engines_int8.py

clean: ## remove what was built or cached; .venv and .assets stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
