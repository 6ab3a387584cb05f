# `make demo` and `make test` set everything up by themselves; a second call finds the stamp and starts at once.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile   # what is never imported is never compiled: 40 s less
READY := .venv/ready

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/growth demo

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff check .

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@echo 'Setting up .venv: PyTorch and the rest, then the C++ kernels. This is done once, in 1 to 3 minutes.'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) torch==2.13.0
	@$(INSTALL) 'setuptools>=77' ninja
	@$(INSTALL) --no-build-isolation -e '.[growth,test]'
	@touch $@

clean:
	rm -rf .venv build lcikernels/_C.so *.egg-info
