# `make demo` and `make test` set everything up by themselves; a second call finds the stamp and starts at once.

PYTHON ?= python3
PINS := tests/constraints.txt
TORCH := $(shell grep ^torch== $(PINS))
BIN := .venv/bin
PIP := bin/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install      # compiled to bytecode: where Python may not write it later, every start costs 16 s more
READY := .venv/ready
RECENT = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12'; exit 1; }
# The libraries that pyproject.toml names; without torch, whose plain name is a build of gigabytes.
NAMES := bin/python -c 'import importlib.metadata as m, re; names = {re.match("[a-z_-]+", x)[0] for x in m.requires("lcikernels") \
	if re.search("extra == .(growth|data|test)", x)}; print(*sorted(names - {"lcikernels", "torch"}))'

SEES = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
	{ echo 'torch of $(PYTHON) sees no GPU; name a Python whose torch does: make gpu PYTHON=python3.12'; exit 1; }

.PHONY: demo test test-all fuzz kill sanitize lint bench gpu setup wheel wheels newest pins clean

demo: setup
	$(BIN)/growth demo

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# Of what `make test` takes a sample of: every case.
test-all: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --everything

# Runs of every verb are killed, and meet disks that fail, at so many calls: about 2 s of a processor each.
kill: KILLS ?= 200
kill: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/growth/test_bad_day.py --kills=$(KILLS)

# So many drawn calls of each op, and a twentieth of that of each verb, the same ones each time; `make test` has a sample
# of them.
fuzz: CALLS ?= 10000
fuzz: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --calls=$(CALLS) tests/ops/test_fuzz.py \
		tests/growth/test_fuzz.py

bench: .venv/bench
	$(BIN)/python -m pytest -q benchmarks/bench_cpu.py

# The C++ under the sanitizers of g++, which all of it is compiled for: a line for each part, and what was said if it failed.
sanitize: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -v -rs tests/csrc/sanitize.py

# Installs nothing. Rivals in .rivals/ are compiled meanwhile. The tests run in 16 processes, for they compile hundreds of
# kernels; a quarter of a file that hangs is ended. No case begins 450 s after the start. A warning of what is installed
# there is no failure. In 90 s of it the fastest tiles are found. COMMIT is needed where git says nothing.
gpu:
	@$(SEES)
	@until=$$(($$(date +%s) + 450)); mkdir -p build; \
	$(PYTHON) -m benchmarks.rivals >build/rivals.log 2>&1 & \
	$(PYTHON) setup.py -q build_ext --inplace; \
	for part in 1of4 2of4 3of4 4of4; do printf "%s $$part\n" tests/ops/test_*.py; done | \
		xargs -n 2 -P 16 sh -c 'log=build/$${0##*/}.$$1.log; \
		timeout 240 $(PYTHON) -m pytest -q -W default --part=$$1 $$0 >$$log 2>&1; failed=$$?; \
		cat $$log; [ $$failed = 5 ] || exit $$failed'; \
	tests=$$?; wait; cat build/rivals.log; \
	$(PYTHON) -m benchmarks.tune $$(($$(date +%s) + 90)); \
	$(PYTHON) -m pytest -q -rfEs -W default benchmarks/bench_gpu.py --until=$$until \
		$(if $(COMMIT),--commit=$(COMMIT)) $$([ $$tests = 0 ] || echo --tests-failed); \
	benchmarks=$$?; exit $$((tests || benchmarks))

.venv/bench: $(READY)
	@.venv/$(INSTALL) --no-build-isolation -c $(PINS) -e '.[bench]'
	@touch $@

lint: setup
	$(BIN)/ruff check .

setup: $(READY)

$(READY): pyproject.toml setup.py $(PINS) $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	@.venv/$(PIP) --version >/dev/null 2>&1 || { $(RECENT) && $(PYTHON) -m venv --clear .venv; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		{ echo 'Installing PyTorch into .venv, once: half a minute, or what its download takes.'; \
		.venv/$(INSTALL) -c $(PINS) $(TORCH); }
	@echo 'Installing the other libraries, and compiling the kernels: 1 to 3 minutes.'
	@.venv/$(INSTALL) -c $(PINS) setuptools ninja
	@.venv/$(INSTALL) --no-build-isolation -c $(PINS) -e '.[growth,test]'
	@$(BIN)/python -m lcikernels | sed -n 1,2p
	@touch $@

# For every Python, and this platform alone; LCIKERNELS_BUILD=none leaves out what is compiled, for every platform.
wheel: setup
	@rm -rf dist
	@$(BIN)/python setup.py -q sdist bdist_wheel
	@ls -sh dist/*

# It, and the one without compiled kernels, in clean environments: each of PYTHONS with each of TORCHES, torch alone first,
# then what lcikernels[growth] asks for. A torch that is not for processors alone brings gigabytes of CUDA.
# make wheels PYTHONS='python3.11 python3.13' TORCHES='2.10.0 2.13.0'
PYTHONS ?= $(PYTHON)
TORCHES ?= $(subst torch==,,$(TORCH))
wheels: wheel
	@rm -rf build/pure
	@LCIKERNELS_BUILD=none $(BIN)/python setup.py -q bdist_wheel --dist-dir build/pure
	@set -e; here=$$PWD; for python in $(PYTHONS); do for torch in $(TORCHES); do \
		env=$$here/.venv-wheels/$${python##*/}-$$torch; user="$$env/bin/python -W ignore $$here/tests/wheel_user.py"; \
		$$python -m venv --clear $$env; $$env/$(INSTALL) torch==$$torch; \
		( cd $$(mktemp -d); $$env/$(INSTALL) --force-reinstall --no-deps $$here/build/pure/*.whl; $$user torch pure; \
		$$env/$(INSTALL) --force-reinstall --no-deps $$here/dist/*.whl; $$user torch compiled; \
		$$env/$(INSTALL) "$$(ls $$here/dist/*.whl)[growth]"; $$env/$(PIP) check; $$user growth compiled; \
		$$env/$(INSTALL) --force-reinstall --no-deps $$here/build/pure/*.whl; $$user growth pure ); \
	done; done

# The newest release of every library but torch, whatever pyproject.toml allows: pip tells what is beyond that.
newest:
	@$(RECENT) && $(PYTHON) -m venv --clear .venv-newest
	@echo 'Installing the newest of every library into .venv-newest: 2 to 5 minutes.'
	@.venv-newest/$(INSTALL) $(TORCH) setuptools ninja
	@.venv-newest/$(INSTALL) --no-build-isolation -e '.[growth,test]'
	@.venv-newest/$(INSTALL) --upgrade $$(.venv-newest/$(NAMES))
	@.venv-newest/$(PIP) freeze --exclude-editable
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n 2 tests/models tests/layers tests/growth

# Where these are green in .venv-newest, what is there becomes what set-up installs.
pins:
	@.venv-newest/$(PIP) freeze --all --exclude-editable --exclude pip >.venv-newest/pins
	@{ head -1 $(PINS); sed 's/+.*//' .venv-newest/pins; } >.venv-newest/all && mv .venv-newest/all $(PINS)

clean:
	rm -rf .venv .venv-newest .venv-wheels build dist lcikernels/_C.so *.egg-info
