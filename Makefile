# make quickstart   install, distil the digits teacher, show teacher and student side by side
# make test         install and run the tests (some 130 s on two idle cores)
# make test-all     the slow tests too
# make test-lowest  the tests on the lowest versions that pyproject.toml allows
# make check        what CI runs: lint, types, tests
#
# TORCH=...  what to install torch from, before anything else, such as TORCH="torch torchvision --index-url ADDRESS" with
#            the CPU builds' address for machines without a GPU (torchvision, which torch-fidelity needs, must be of the
#            same kind); by default pip chooses.

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN = $(VENV)/bin

.PHONY: quickstart test test-all test-lowest lint check clean

quickstart: $(VENV)/train.stamp
	$(BIN)/accelerate launch recipes/train_student_unet.py --preset digits --resume_from_checkpoint latest

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -n auto

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -n auto -m "slow or not slow"

test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install -q -c tests/lowest.txt -e ".[test]"
	$(VENV)-lowest/bin/python -m pytest -q -n auto

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

$(VENV)/%.stamp: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install -q $(TORCH))
	$(BIN)/pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info
