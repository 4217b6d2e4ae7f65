PYTHON ?= python3.11
VENV := .venv
RAYS := $(sort $(patsubst constraints/ray-%.txt,%,$(wildcard constraints/ray-*.txt)))
# ENGINE=cpu or ENGINE=vllm, for a machine with a CUDA GPU, and RAY, a minor; by default what is
# installed, else the CPU's engine and the newest Ray.
NOW := $(subst -ray-, ,$(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*))))
ENGINE ?= $(or $(word 1,$(NOW)),cpu)
RAY ?= $(or $(word 2,$(NOW)),$(lastword $(RAYS)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(ENGINE)-ray-$(RAY)
BENCHMARKS := import-time dispatch compile-cache overlap transfer download first-token node-init
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/examples

.PHONY: help install demo test test-unit test-matrix probe lint docs bench bench-plots clean $(BENCHMARKS:%=bench-%)

help:
	@echo "make demo             serve a real model through several stacked callbacks"
	@echo "make test             run all tests, on a real Ray cluster and a real engine: minutes"
	@echo "make test-unit        run those without mark: no cluster, no engine, none that is slow"
	@echo "make test-matrix      run the tests that matter on every Ray and Python; docs/compatibility.md"
	@echo "                      ARGS='2.57 3.13' for these alone"
	@echo "make probe RAY=2.57.1 look whether a Ray has what this package uses; without RAY, all Rays"
	@echo "make install          create $(VENV) with the package, an engine and the test tools"
	@echo "                      RAY=2.58 with another Ray: $(RAYS)"
	@echo "make lint             ruff and mypy"
	@echo "make docs             build the reference of the public names into .cache/reference"
	@echo "make bench            all benchmarks, an hour; one: $(BENCHMARKS:%=bench-%)"
	@echo "                      ARGS='--rounds 2' for fewer rounds"
	@echo "make clean            remove $(VENV) and .cache"
	@echo "ENGINE=vllm installs the official vLLM, for a machine with a CUDA GPU"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml scripts/install.sh $(wildcard constraints/ray-$(RAY).txt)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" RAY="$(RAY)" scripts/install.sh $(ENGINE)
	@touch $@

demo: $(INSTALLED)
	@exec python examples/demo.py

# Two processes, each with a cluster of its own: a test on a cluster mostly waits.
test: $(INSTALLED)
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-unit: $(INSTALLED)
	@python -m pytest -m "not ray and not engine and not slow"

test-matrix: $(INSTALLED)
	@python scripts/matrix.py $(ARGS)

# RAY as given on the command line, not as installed.
probe: WANTED := $(if $(filter command line environment,$(origin RAY)),$(RAY),--all)
probe:
	@"$(firstword $(wildcard $(BIN)/python) $(PYTHON))" scripts/probe.py $(WANTED)

lint: $(INSTALLED)
	@ruff check .
	@ruff format --check .
	@mypy

docs: $(INSTALLED)
	@python scripts/api_reference.py

$(BENCHMARKS:%=bench-%): bench-%: $(INSTALLED)
	@python benchmarks/$(subst -,_,$*).py $(ARGS)

bench: $(BENCHMARKS:%=bench-%) bench-plots

bench-plots: $(INSTALLED)
	@python -c 'import matplotlib' 2>/dev/null || python -m pip install --quiet --editable '.[bench]'
	@python benchmarks/plot.py

clean:
	rm -rf $(VENV) .cache
