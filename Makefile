# Everything runs in .venv, made on first use from constraints.txt; `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# Kept to deadlines by the clock: they run by themselves.
TIMED  := tests/tasks tests/serve/test_gateway.py tests/serve/openai/test_live.py tests/cluster/test_node.py \
          tests/cluster/test_ray.py tests/cluster/test_namespaces.py tests/cluster/dataset tests/cluster/pipeline \
          tests/packaging/test_installed.py

# An OpenMP worker that spins for long starves whatever runs beside it; children inherit this.
export GOMP_SPINCOUNT ?= 1000
# The environment variable, unlike `-c`, also pins what builds packages in isolation.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv install demo test lint docs man format bench bench-plan bench-generate bench-training bench-serve \
        bench-cluster bench-papers clean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(BIN)/python  ## make an empty virtual environment in .venv

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(STAMP)  ## install narrowboat with all it needs, at pinned versions

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a real network and a 1.2 GB one, each in a fraction of its bytes (ARGS=...)
	$(BIN)/python -m narrowboat demo $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name" for some of them)
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else # deadlines are kept by themselves; the rest shares the cores
	$(BIN)/python -m pytest $(TIMED)
	$(BIN)/python -m pytest -n 2 $(addprefix --ignore=,$(TIMED))
endif

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into build/site, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

man: $(STAMP)  ## write the manual pages anew from the command line's own help
	$(BIN)/python packaging/man.py

format: $(STAMP)  ## let ruff put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure against plain PyTorch, mmap, accelerate and diffusers (ARGS=...)
	$(BIN)/python benchmarks/inference.py $(ARGS)

bench-plan: $(STAMP)  ## plans predicted and measured, schemes, ablations, live changes (ARGS=...)
	$(BIN)/python benchmarks/plan.py $(ARGS)

bench-generate: $(STAMP)  ## measure decoding against accelerate, AirLLM and mmap, and sweeps of many inputs (ARGS=...)
	$(BIN)/python benchmarks/generate.py $(ARGS)

bench-training: $(STAMP)  ## measure training against recompute, accumulation, torch.compile and accelerate (ARGS=...)
	$(BIN)/python benchmarks/training.py $(ARGS)

bench-serve: $(STAMP)  ## measure the gateway: overhead, throughput, overload, kills, vanishing clients (ARGS=...)
	$(BIN)/python benchmarks/serve.py $(ARGS)

bench-cluster: $(STAMP)  ## measure several nodes on this machine: tasks, a split model, a data set (ARGS=...)
	$(BIN)/python benchmarks/cluster.py $(ARGS)

bench-papers: $(STAMP)  ## check the claims of SwapNet, RT-Swap and SAGE; under an hour (ARGS=--quick: five minutes)
	$(BIN)/python benchmarks/papers.py $(ARGS)

clean:  ## remove the environment and every cache
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
