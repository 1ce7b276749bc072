# `make demo` and `make test` set everything up by themselves the first time, and reuse it afterwards.
# Needed: Python 3.10 or newer, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .cache/wheels
CHGNET := chgnet==0.4.2

.PHONY: demo test lint clean

# torch is asked for by its exact version before anything else: that gets the CPU build, not gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(WHEELS)/chgnet: | $(VENV)/installed
	mkdir -p $(WHEELS)
	ls $(WHEELS)/chgnet-*.whl >/dev/null 2>&1 || $(BIN)/python -m pip download --quiet --no-deps -d $(WHEELS) $(CHGNET)
	touch $@

demo: $(VENV)/installed $(WHEELS)/chgnet
	$(BIN)/weightlab demo --data $(WHEELS)

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build *.egg-info
