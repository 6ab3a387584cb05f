# `make demo` and `make test` set everything up by themselves; a second call finds the stamp and starts at once.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install      # compiled to bytecode: where Python may not write it later, every start costs 16 s more
READY := .venv/ready
RECENT = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo 'Python 3.10 or newer is needed; name one: make PYTHON=python3.12'; exit 1; }

SEES = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
	{ echo 'torch of $(PYTHON) sees no GPU; name a Python whose torch does: make gpu PYTHON=python3.12'; exit 1; }

.PHONY: demo test lint bench gpu setup clean

demo: setup
	$(BIN)/growth demo

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

bench: .venv/bench
	$(BIN)/python -m pytest -q benchmarks/bench_cpu.py

# Installs nothing. Rivals in .rivals/ are compiled meanwhile. The tests run in 16 processes, for they compile hundreds of
# kernels; a quarter of a file that hangs is ended. No case begins 450 s after the start. A warning of what is installed
# there is no failure. COMMIT is needed where git says nothing.
gpu:
	@$(SEES)
	@until=$$(($$(date +%s) + 450)); mkdir -p build; \
	$(PYTHON) -m benchmarks.gpu_sides >build/rivals.log 2>&1 & \
	$(PYTHON) setup.py -q build_ext --inplace; \
	for part in 1of4 2of4 3of4 4of4; do printf "%s $$part\n" tests/ops/test_*.py; done | \
		xargs -n 2 -P 16 sh -c 'log=build/$${0##*/}.$$1.log; \
		timeout 240 $(PYTHON) -m pytest -q -W default --part=$$1 $$0 >$$log 2>&1; failed=$$?; \
		cat $$log; [ $$failed = 5 ] || exit $$failed'; \
	tests=$$?; wait; cat build/rivals.log; \
	$(PYTHON) -m pytest -q -rfEs -W default benchmarks/bench_gpu.py --until=$$until \
		$(if $(COMMIT),--commit=$(COMMIT)) $$([ $$tests = 0 ] || echo --tests-failed); \
	benchmarks=$$?; exit $$((tests || benchmarks))

.venv/bench: $(READY)
	@$(INSTALL) --no-build-isolation -e '.[bench]'
	@touch $@

lint: setup
	$(BIN)/ruff check .

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@echo 'Setting up .venv: PyTorch and the rest, then the C++ kernels. This is done once, in 1 to 3 minutes.'
	@$(PIP) --version >/dev/null 2>&1 || { $(RECENT) && $(PYTHON) -m venv --clear .venv; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) torch==2.13.0
	@$(INSTALL) 'setuptools>=77' ninja
	@$(INSTALL) --no-build-isolation -e '.[growth,test]'
	@$(BIN)/python -m lcikernels
	@touch $@

clean:
	rm -rf .venv build lcikernels/_C.so *.egg-info
