# Two commands for a fresh machine with Python >= 3.10 and a C++ compiler:
#   make demo   install into .venv, build the runtime, convert a small real model, compare it with float
#   make test   install into .venv, build the runtime and the oracles, run all tests
# Builds and downloads are kept in the user cache (~/.cache/gguf-splitquant), so the second run is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo runtimes test test-harness test-asan test-kill fuzz coverage package lint clean

demo: $(VENV)/installed
	$(BIN)/gguf-splitquant build-runtime
	$(BIN)/python scripts/demo.py demo

runtimes: $(VENV)/installed-test
	$(BIN)/gguf-splitquant build-runtime
	$(BIN)/gguf-splitquant build-runtime --stock --with-tools

test: runtimes
	$(BIN)/python -m pytest

# lines and branches that no test runs, listed; also as pages in coverage/
coverage: runtimes
	$(BIN)/python -m pytest --cov --cov-report=term-missing --cov-report=html:coverage

# wheel and sdist; the wheel in an environment of its own
package: $(VENV)/installed-test
	PYTHONPATH=. $(BIN)/python scripts/check_package.py build/package

# ARC against lm-evaluation-harness: a gigabyte of packages and a quarter of an hour
test-harness: runtimes
	$(BIN)/pip install --quiet --editable '.[eval-oracle]'
	$(BIN)/python -m pytest tests/evaluation/test_arc_harness.py

# hostile split files through a llama.cpp that watches its own memory: some minutes to build, then seconds
test-asan: runtimes
	$(BIN)/gguf-splitquant build-runtime --sanitized
	$(BIN)/python -m pytest tests/attacks/test_sanitized.py

# every reader of strangers' files for FUZZ_SECONDS; findings stay in fuzz-findings/
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/installed-test
	$(BIN)/pip install --quiet 'atheris>=3'
	$(BIN)/python -m tests.fuzz.fuzz --seconds $(FUZZ_SECONDS)

# conversions that die by kill -9, a few hundred times
test-kill: runtimes
	KILLS=$${KILLS:-400} $(BIN)/python -m pytest -s tests/test_resume.py -k "killed"

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet --editable '.[build]'
	touch $@

$(VENV)/installed-test: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet --editable '.[build,test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-lint: $(VENV)/created pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo coverage
