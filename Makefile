# make demo    set up .venv, then run every step on real text and show the model
# make test    set up .venv, then run the tests; `make test-long` has slow ones that matter most, `make test-all` all
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

# Slow tests of what matters most, minutes each.
LONG_TESTS := \
	tests/pretraining/test_failures.py::test_a_crash_and_a_stopped_process_are_told_and_change_nothing \
	tests/pretraining/test_failures.py::test_restarts_are_counted_until_there_is_progress \
	tests/pretraining/test_spikes.py::test_the_run_goes_back_and_is_the_one_that_never_had_that_text \
	tests/pretraining/test_distributed_pretrain_exact.py::test_kills_leave_losses_batches_and_weights_bit_identical \
	tests/pretraining/test_distributed_pretrain_run.py::test_a_killed_worker_is_started_again_and_the_result_is_the_same \
	tests/tools/test_find_fastest.py::test_each_combination_is_a_row_whatever_becomes_of_it \
	tests/tools/test_find_fastest.py::test_the_best_is_yaml_that_training_takes \
	tests/pretraining/test_context_parallel.py::test_a_shared_run_is_the_run_of_one_process \
	tests/pretraining/test_packed_dataset.py \
	tests/pretraining/test_slow_ranks.py::test_a_slow_process_is_named_with_its_place_and_the_others_wait_for_it \
	tests/tools/test_check_cluster.py::test_a_slow_process_is_named_and_a_wrong_one_refused \
	tests/test_gpu_acceptance.py::test_every_row_runs_in_small_and_without_ray

test-long: $(READY)
	@$(RUN) python -m pytest -n $(TEST_PROCESSES) --dist=loadfile $(LONG_TESTS)

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
