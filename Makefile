# make run: train and evaluate SLIFMR on ml-100k.   make test: lint, types, tests.   make docs: the site in build/site.
# Each sets everything up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test lint docs clean

run: $(READY)
	$(BIN)/python run_recbole_slifmr.py --model=SLIFMR --dataset=ml-100k

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps recbole==1.2.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) build docs/api docs/commands log log_tensorboard saved benchmark benchmarks/out tune dataset_atomic/ml-100k
