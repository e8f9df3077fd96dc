# Every target runs in .venv and creates it on first use. Nothing needs root.
# With INSTALLED=1 the targets that measure use the packages of PYTHON instead, for a machine that has its own.

PYTHON ?= python3
RANKS ?= 2
JOBS ?= auto

VENV := .venv
ifdef INSTALLED
STAMP :=
RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
else
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
endif

# One folder for everything that one call of make measures: `make test-gpu bench`.
ifndef REPORT
REPORT := reports/$(shell date +%Y-%m-%d-%H%M%S)
endif
DEMO_DATA := data/digits
DEMO_CONFIG := train/configs/digits.yaml
DEMO_RUN := runs/digits
FASHION_DATA := data/fashion
FASHION_CONFIG := train/configs/fashion.yaml
FASHION_RUN := runs/fashion

# deepspeed starts `python` and `ninja` by name. Without PIP_NO_INPUT pip could wait for an answer that never comes.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-fashion ablate test test-gpu gpu-day bench kernel-report lint format clean

help:  ## list the targets
	@echo 'usage: make TARGET [PYTHON=python3.12] [RANKS=2] [JOBS=auto] [REPORT=DIR] [INSTALLED=1] [MINUTES=9]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv with the package, its tests and the pinned versions; done by other targets too

# Repeated when one of these files changes.
$(STAMP): setup.py pyproject.toml constraints.txt tools/install_torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: $(PYTHON) is missing or older than Python 3.11; name a newer one: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'error: $(PYTHON) cannot make virtual environments; install its venv module (Debian: python3-venv)' >&2; exit 1; }
	@test -x $(VENV)/bin/pip || { echo '$(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); }
	tools/install_torch.sh $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

# Without numactl deepspeed counts a CPU as one device, so the number of ranks is given.
demo: $(STAMP)  ## train on handwritten digits, measure the result and draw it: about 4 minutes on 2 cores
	python train/prepare.py digits $(DEMO_DATA)
	deepspeed --num_gpus $(RANKS) train/pretrain.py $(DEMO_CONFIG)
	python train/evaluate.py $(DEMO_RUN) --eta 1.5
	python train/plot.py $(DEMO_RUN)
	python train/plot.py $(DEMO_RUN) --overview --pack 2 --eta 1.5 --prompt zero one two three four five six seven eight nine

# Resumes where it was interrupted.
demo-fashion: $(STAMP)  ## the same on pictures of clothes: 36 minutes on 2 cores; resumes when run again
	python train/prepare.py fashion-mnist $(FASHION_DATA)
	deepspeed --num_gpus $(RANKS) train/pretrain.py $(FASHION_CONFIG)
	python train/evaluate.py $(FASHION_RUN)

# Resumes where it was interrupted.
ablate: $(STAMP)  ## compare settings by runs on digits, into runs/ablations: 5 hours at most; resumes when run again
	python train/ablate.py

# One process per core. All tests of a file run in the same process and share its fixtures. Files run in their order:
# by number of tests, the file that compiles the kernel report for two minutes would come last and run alone.
test: $(STAMP)  ## run the tests that need no GPU, one process per core (JOBS=1: a single process)
	pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10

# The outcome is in REPORT. `make -k test-gpu bench` measures even if a test fails.
test-gpu: $(STAMP)  ## run the tests that need an NVIDIA GPU; results go to REPORT
	@mkdir -p $(REPORT)
	TRITON_INTERPRET=0 $(RUN) -m pytest -m gpu --durations=10 --junit-xml=$(REPORT)/test-gpu.xml tests/gpu

# Not a new folder each time: the same command goes on where it stopped.
gpu-day: $(STAMP)  ## the first hour on a GPU, in stages of under 8 minutes, into reports/gpu-day; resumes when run again
	$(RUN) benchmarks/gpu_day.py --out reports/gpu-day $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REHEARSE),--rehearse)

# All benchmarks run before a failure of one fails the target.
bench: $(STAMP)  ## measure everything that this machine can run, into REPORT
	failed=0; \
	$(RUN) benchmarks/kernel_report.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/cache_sim.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/attn_bench.py --out $(REPORT) --minutes 30 || [ $$? = 3 ] || failed=1; \
	$(RUN) benchmarks/pointwise_bench.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/layer_bench.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/step_bench.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/data_bench.py --out $(REPORT) || failed=1; \
	$(RUN) benchmarks/sampling_bench.py --out $(REPORT) || failed=1; \
	exit $$failed

kernel-report: $(STAMP)  ## compile every kernel for its GPUs, without a GPU, and report on them into REPORT
	$(RUN) benchmarks/kernel_report.py --out $(REPORT)

lint: $(STAMP)  ## check style, formatting and types
	ruff check .
	ruff format --check .
	mypy

format: $(STAMP)  ## format the code and fix what ruff can fix
	ruff check --fix .
	ruff format .

clean:  ## remove caches and build output, never .venv, data or runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard kernels transfusion_fast train benchmarks tests tools) -name __pycache__ -type d -prune -exec rm -rf {} +
