# `make demo` and `make test` work on a fresh machine: each makes the environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?= -n 2 --dist loadscope
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env demo test check tests test-web bench bench-serve claims docs clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-8s %s\n", $$1, $$2}'

# torch first and alone: other resolvers and ranges fetch several GB of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

env: $(READY) ## make the environment in .venv

demo: $(READY) ## index the Python standard library's documentation and ask it three questions
	$(BIN)/python examples/demo.py

test: check tests ## style, types and the whole test suite

check: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: $(READY) ## the tests alone; PYTEST_ARGS changes how
	$(BIN)/python -m pytest $(PYTEST_ARGS)

CHROMIUM ?= /usr/bin/chromium

test-web: $(READY) ## the pages in a real browser, and the service's schema; installs Debian's Chromium where it is missing
	@test -x $(CHROMIUM) || apt-get install -y -q chromium || { echo "Install Chromium, or name it: make test-web CHROMIUM=..."; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[web]"
	POLYHEAD_WEB=1 POLYHEAD_CHROMIUM=$(CHROMIUM) POLYHEAD_SCREENSHOTS=$(CURDIR)/build/screenshots \
	$(BIN)/python -m pytest tests/web tests/serve/test_served_clients.py $(PYTEST_ARGS)

bench-serve: $(READY) ## the service under load, beside the bare engine
	$(BIN)/python benchmarks/serve.py

bench: $(READY) ## speed and memory against peers, and search quality, written to benchmarks/results/
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/composition.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/flex.py
	$(BIN)/python benchmarks/late.py
	$(BIN)/python benchmarks/rerank.py
	$(BIN)/python benchmarks/head_pooling.py
	@mkdir -p benchmarks/results
	for data in mrag-wikipedia cranfield limit-small; do \
		$(BIN)/python -m polyhead evaluate retrieval --data $$data --json > benchmarks/results/$$data.json || exit 1; done
	$(BIN)/python benchmarks/figures.py

claims: $(READY) ## run every claim at smoke scale, keep the evidence, write docs/claims.md
	$(BIN)/python -m polyhead claims run --all --jobs 2 --save --page docs/claims.md

docs: $(READY) ## build the documentation site into site/
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean: ## remove the environment and everything built
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
