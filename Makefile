# make demo        train, export and try a small model (about 5 minutes on two cores)
# make test        what CI runs
# make test-faults the whole fault matrix: killed, stopped, hanging ranks, damaged files (about 12 minutes)
# make soak        a run of 300 steps that is hit by a fault every few seconds, and what is left of it
# make check-all   the long matrices too
#
# PIP_FLAGS goes to every pip call, for those who want another build of torch; see README.md.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python

# One thread per process: the tests and the demo start several processes per core.
THREADS := OMP_NUM_THREADS=1

.PHONY: demo test test-faults soak check-all lint clean

demo: $(VENV)/plots.stamp
	$(THREADS) $(RUN) -m megatron_bert_tp.demo

test: lint
	$(THREADS) $(RUN) -m pytest -n 2 -m "not slow and not faults and not gpu"

# One test at a time: some of them measure how long a rank is silent.
test-faults: $(VENV)/test.stamp
	$(THREADS) $(RUN) -m pytest -m "faults and not gpu"

soak: $(VENV)/test.stamp
	$(THREADS) $(RUN) -m tests.faults.soak

check-all: lint
	$(THREADS) $(RUN) -m pytest -n 2 -m "not gpu"

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/pip.stamp:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	touch $@

# One stamp per set of extras: `make demo` does not install the tools of the tests.
$(VENV)/%.stamp: $(VENV)/pip.stamp pyproject.toml constraints.txt
	$(RUN) -m pip install $(PIP_FLAGS) -c constraints.txt -e .[$*]
	touch $@

.SECONDARY: $(VENV)/pip.stamp
