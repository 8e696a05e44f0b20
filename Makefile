# make demo   set up, then fine-tune, align, sweep and decode on an embedded tiny model
# make test   set up, then run the tests
# make lint   set up, then check style and types
# make gpu-check   on a machine with a GPU and the packages: its tests, the demo, and the figures of docs/performance.md
# make serve-check   the server's requests against generate, on every base of the compatibility page (minutes)
# make test-llama-cpp   exported adapters in llama.cpp, which is built first (8 minutes of a CPU), against PEFT and generate
# make docs   set up, then build the documentation into site/; a broken link or reference fails

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.complete
DOCS_SETUP := $(VENV)/.docs-complete
LLAMA_CPP := $(VENV)/llama-cpp
LLAMA_CPP_SETUP := $(VENV)/.llama-cpp-complete
# to compile all modules at once takes over a minute; those that are used are compiled when they are first imported
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: demo test lint docs setup clean gpu-check serve-check test-llama-cpp

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

# beside the environment, in a folder of its own: no other command needs it
$(LLAMA_CPP_SETUP): $(SETUP)
	$(INSTALL) --no-deps --upgrade --target $(LLAMA_CPP) llama-cpp-python==0.3.36 diskcache==5.6.3
	@touch $@

$(DOCS_SETUP): $(SETUP)
	$(INSTALL) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) runs site
