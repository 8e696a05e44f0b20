# make demo   set up, then fine-tune, align, sweep and decode on an embedded tiny model
# make test   set up, then run the tests
# make lint   set up, then check style

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.complete

.PHONY: demo test lint setup clean

demo: $(SETUP)
	$(VENV)/bin/dera sft --config configs/tiny/sft.yaml
	$(VENV)/bin/dera preferences --config configs/tiny/preferences.yaml
	$(VENV)/bin/dera dpo --config configs/tiny/dpo.yaml
	$(VENV)/bin/dera sweep --config configs/tiny/sweep.yaml

test: $(SETUP)
	$(RUN) -m pytest -n auto --dist loadfile

lint: $(SETUP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.11, which transformers 5 and trl 1 need; try: make PYTHON=python3.12 …' >&2; exit 2; }
	@echo 'Installing into $(VENV) (a few minutes the first time) …'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
