# `make demo` and `make test` set up everything that they need the first time, and reuse it afterwards.
# The machine needs Python 3.10 or newer, pip and make; PYTHON=python3.12 chooses another one.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
WHEELS := .cache/wheels

.PHONY: demo test torture mutants fuzz lint clean

demo: $(VENV)/installed $(WHEELS)/chgnet
	$(BIN)/weightlab demo --data $(WHEELS)

test: lint $(WHEELS)/chgnet
	$(BIN)/python -m pytest -n $(WORKERS)

# All of what `make test` tries seeded parts of: kills, leftovers, swapped links, spoiled folders.
torture: $(VENV)/installed $(WHEELS)/chgnet
	WEIGHTLAB_TORTURE=1 $(BIN)/python -m pytest -n $(WORKERS) tests/stack tests/hostile tests/ops/test_recycle_killed.py

# Whether the tests notice changes of single places in the library, as many as COUNT says, drawn by SEED.
COUNT ?= 200
SEED ?= 0
mutants: $(VENV)/installed $(WHEELS)/chgnet
	$(BIN)/python tests/mutants.py --count $(COUNT) --seed $(SEED) --workers $(WORKERS)

# Of files that are wrong, with any seed: INPUTS=2000 FIRST=500000 are fewer, and others.
INPUTS ?= 100000
FIRST ?= 0
fuzz: $(VENV)/installed
	PYTHONPATH=. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.run $(INPUTS) --first $(FIRST) --workers $(WORKERS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first, alone and by its exact version: so pip takes a build for CPUs where one is offered beside the
# large one for GPUs. (Some systems have Python's venv without the pip in it; pip then fills the environment from outside.)
$(VENV)/installed: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

# Two real checkpoints lie in this wheel. It is read, never installed, so any machine takes the one and same build of it.
$(WHEELS)/chgnet: | $(VENV)/installed
	$(PIP) download --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux2014_x86_64 \
	  -d $(WHEELS) chgnet==0.4.2
	touch $@

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
