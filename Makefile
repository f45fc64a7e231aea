# From nothing: `make demo` trains a first model; `make test` checks everything CI checks.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: demo test test-slow foreign lint types clean

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install -q -c constraints.txt torch
	$(RUN)python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install -q -c constraints.txt torch
	$(RUN)python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

demo: $(VENV)/.demo
	$(RUN)shoestring assets install minilm rotten-tomatoes
	$(RUN)shoestring train examples/first.yaml --overwrite

lint: $(VENV)/.done
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: $(VENV)/.done
	$(RUN)mypy

test: lint types
	$(RUN)python -m pytest -q --doctest-modules src/shoestring
	$(RUN)python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.done
	$(RUN)python -m pytest -m slow

# peft's own test-suite on our adapters
foreign: $(VENV)/.done
	$(RUN)python tests/foreign/run.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
