PYTHON ?= python3.11
VENV := .venv
# ENGINE=cpu or ENGINE=vllm, for a machine with a CUDA GPU; by default what is installed, else cpu.
ENGINE ?= $(or $(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*))),cpu)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(ENGINE)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/examples

.PHONY: help install demo test test-unit lint bench-import bench-node-init clean

help:
	@echo "make demo             serve a real model through several stacked callbacks"
	@echo "make test             run all tests; test-unit runs those that need no cluster"
	@echo "make install          create $(VENV) with the package, an engine and the test tools"
	@echo "make lint             ruff and mypy"
	@echo "make bench-node-init  node initialization, stock Ray against ours"
	@echo "make bench-import     import time, against that of pluggy and pydantic"
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
	@python -m pytest -m "not ray and not engine"

lint: $(INSTALLED)
	@ruff check .
	@ruff format --check .
	@mypy

bench-import: $(INSTALLED)
	@python benchmarks/import_time.py

bench-node-init: $(INSTALLED)
	@python benchmarks/node_init.py

clean:
	rm -rf $(VENV) .cache
