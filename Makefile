# make demo    set up .venv, then run every step on real text and show the model
# make test    set up .venv, then run the quick tests; `make test-long` those marked long, `make test-all` all
# make clean   remove what the demo made; `make distclean` removes .venv too

PYTHON ?= python3
DEMO_DIR ?= demo
DEMO_SIZE ?= 4MB
DEMO_TRAIN_FLAGS ?=
TEST_PROCESSES ?= 2

VENV := .venv
READY := $(VENV)/.installed
BIN := $(CURDIR)/$(VENV)/bin
RUN := env PATH="$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)"

.PHONY: demo test test-long test-all lint format clean distclean setup requirements

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"PYTHON=$(PYTHON) is {v[0]}.{v[1]}; give one from 3.11 to 3.13: make PYTHON=python3.11")'
	@echo "setting up $(VENV): $$(grep -c == requirements.txt) packages, takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.txt
	@touch $@

demo: $(READY)
	@$(RUN) DEMO_DIR="$(DEMO_DIR)" DEMO_SIZE="$(DEMO_SIZE)" DEMO_TRAIN_FLAGS="$(DEMO_TRAIN_FLAGS)" bash examples/demo.sh

test: $(READY)
	@$(RUN) python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder

test-long: $(READY)
	@$(RUN) python -m pytest -m long -n $(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder

test-all: $(READY)
	@$(RUN) python -m pytest

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) shellcheck pipeline.sh .ci/run examples/*.sh
	$(RUN) hadolint examples/Dockerfile

format: $(READY)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# After `poetry lock`. Needs Poetry 2 with poetry-plugin-export.
requirements:
	poetry export --all-extras --all-groups --format requirements.txt --output requirements.txt

clean:
	@test ! -e "$(DEMO_DIR)" || test -e "$(DEMO_DIR)/parquet/manifest.json" || { echo "DEMO_DIR=$(DEMO_DIR) was not made by the demo, so it is left alone"; exit 2; }
	rm -rf "$(DEMO_DIR)"

distclean: clean
	rm -rf $(VENV)
