PYTHON ?= python3.11
VENV := .venv
# ENGINE=cpu or ENGINE=vllm, for a machine with a CUDA GPU; by default what is installed, else cpu.
ENGINE ?= $(or $(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*))),cpu)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(ENGINE)
BENCHMARKS := import-time dispatch overlap transfer download first-token node-init
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/examples

.PHONY: help install demo test test-unit lint bench bench-plots clean $(BENCHMARKS:%=bench-%)

help:
	@echo "make demo             serve a real model through several stacked callbacks"
	@echo "make test             run all tests, on a real Ray cluster and a real engine: minutes"
	@echo "make test-unit        run those without mark: no cluster, no engine, none that is slow"
	@echo "make install          create $(VENV) with the package, an engine and the test tools"
	@echo "make lint             ruff and mypy"
	@echo "make bench            all benchmarks, an hour; one: $(BENCHMARKS:%=bench-%)"
	@echo "                      ARGS='--rounds 2' for fewer rounds"
	@echo "make clean            remove $(VENV) and .cache"
	@echo "ENGINE=vllm installs the official vLLM, for a machine with a CUDA GPU"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml scripts/install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/install.sh $(ENGINE)
	@touch $@

demo: $(INSTALLED)
	@exec python examples/demo.py

test: $(INSTALLED)
	@python -m pytest

test-unit: $(INSTALLED)
	@python -m pytest -m "not ray and not engine and not slow"

lint: $(INSTALLED)
	@ruff check .
	@ruff format --check .
	@mypy

$(BENCHMARKS:%=bench-%): bench-%: $(INSTALLED)
	@python benchmarks/$(subst -,_,$*).py $(ARGS)

bench: $(BENCHMARKS:%=bench-%) bench-plots

bench-plots: $(INSTALLED)
	@python -c 'import matplotlib' 2>/dev/null || python -m pip install --quiet --editable '.[bench]'
	@python benchmarks/plot.py

clean:
	rm -rf $(VENV) .cache
