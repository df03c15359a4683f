# Each target makes .venv by itself and keeps it current. PYTHON=... chooses the interpreter it is made with.

SHELL := bash
BIN := .venv/bin
STAMP := .venv/.stamp
CHANGES_VENV := pyproject.toml $(wildcard plugins/*/pyproject.toml) requirements-dev.txt constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench shop docs fault soak servers services-up services-down

help:
	@echo "make demo           see it work"
	@echo "make test           unit tests on every Python found, then all tests, with real servers"
	@echo "make lint           style, types, import contracts, spelling"
	@echo "make format         apply what the formatter and the safe fixes know"
	@echo "make fault          all that kills, cuts and freezes things, on all setups, and a page of it (RUNS=, SEED=, ONLY=)"
	@echo "make soak           a random mix of faults (MINUTES=, SEED=)"
	@echo "make simulate       months of bad luck on a virtual clock (MESSAGES=, SEED=, RUNS=, JOBS=)"
	@echo "make bench          ratios, measured in one run on this machine"
	@echo "make docs           build the documentation, links checked"
	@echo "make services-up    leave PostgreSQL, MariaDB and Kafka running between runs; make services-down ends them"

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP) servers
	$(BIN)/python -m tests.interpreters
	$(BIN)/pytest tests plugins

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import_linter
	$(BIN)/codespell
	$(BIN)/python -m tests.packaging.tracked_files

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One seed of each scenario on each setup takes less than an hour. Many seeds of some, and on one setup only:
# RUNS=200 ONLY="(f1_ or f2_ or f3_) and postgres-kafka and not found" make fault
fault: $(STAMP) servers
	@rm -f .cache/fault/facts.jsonl
	FAULT_WIDE=1 RUNS=$${RUNS:-1} $(BIN)/pytest -k "$${ONLY:-test}" tests/fault; \
	  code=$$?; $(BIN)/python -m tests.fault.page && exit $$code

soak: $(STAMP) servers
	@rm -f .cache/fault/facts.jsonl
	FAULT_WIDE=1 MINUTES=$${MINUTES:-30} $(BIN)/pytest -k "$${ONLY:-postgres-kafka}" tests/fault/test_f32_soak.py; \
	  code=$$?; $(BIN)/python -m tests.fault.page && exit $$code

simulate: $(STAMP)
	$(BIN)/python -m tests.simulation --messages $${MESSAGES:-100000} --seed $${SEED:-1} --runs $${RUNS:-1} --jobs $${JOBS:-1}

# The shop under load with everything killed again and again; ORDERS, CLIENTS and KILLS set how much.
shop: $(STAMP) servers
	ORDERS=$${ORDERS:-20000} CLIENTS=$${CLIENTS:-8} KILLS=$${KILLS:-10} $(BIN)/pytest -s --timeout 3600 tests/integration/test_shop.py

bench: $(STAMP) servers
	$(BIN)/python -m tests.benchmarks

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

services-up: $(STAMP) servers
	$(BIN)/python -m tests.services up

services-down: $(STAMP)
	$(BIN)/python -m tests.services down

servers: $(STAMP)
	@.ci/servers

$(STAMP): $(CHANGES_VENV)
	@.ci/venv
