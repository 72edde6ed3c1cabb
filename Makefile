# make demo | test | slow | bench | browser | check | docs | reports | claims | gpu | clean. Needs Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NUM_SAMPLES ?= 6
# A demonstration, not a measurement: shorter than the preset, so that it is minutes on two cores.
DEMO_ARGS ?= --steps 90 --set evaluate.epochs=100 --set evaluate.seeds=3
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test slow bench browser check docs reports claims gpu gpu-wheels clean

help:
	@echo "make demo    install, tune DataDAM on the embedded digits, show where pictures and table are"
	@echo "make test    install with the test extra, run the default test suite"
	@echo "make slow    run the tests that take minutes each: random kills, every shipped bench (hours)"
	@echo "make bench   run the benchmarks, which compare two builds of one thing in one run"
	@echo "make browser test the report in chromium (needs chromium and chromedriver)"
	@echo "make check   install with the dev extra, run ruff, mypy and import-linter"
	@echo "make docs    build README and docs/ as a site, build/site/index.html"
	@echo "make reports measure what reports/ holds (about an hour on two cores)"
	@echo "make claims  run the tables of configs/claims and decide the papers' claims (hours, resumable)"
	@echo "make gpu     measure on this machine's GPU what only a GPU can show (at most 11 minutes; docs/gpu.md)"
	@echo "make clean   remove caches and build output (.venv and runs/ stay)"

# pip is the last thing that venv makes: a half-made environment is made again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: ddray needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1); use make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; a change of pyproject.toml or constraints.txt installs again.
$(VENV)/.installed-run: EXTRA :=
$(VENV)/.installed-test: EXTRA := [test]
$(VENV)/.installed-dev: EXTRA := [dev]
$(VENV)/.installed-browser: EXTRA := [browser]
$(VENV)/.installed-docs: EXTRA := [docs]
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRA)'
	@touch $@

# Numbered folders: a second demo stands beside the first.
demo: $(VENV)/.installed-run
	@number=1; while [ -e "runs/demo-$$number" ]; do number=$$((number + 1)); done; \
	run="$(CURDIR)/runs/demo-$$number"; \
	$(PY) -m ddray tune --method datadam --dataset digits --ipc 1 --num-samples $(NUM_SAMPLES) $(DEMO_ARGS) \
		--run-dir "$$run" && \
	for file in distilled.png report.html results.csv; do \
		[ -f "$$run/$$file" ] || { echo "error: $$run/$$file is missing" >&2; exit 1; }; \
	done && \
	printf '\npicture  %s\nreport   %s\ntable    %s\n' "$$run/distilled.png" "$$run/report.html" "$$run/results.csv"

# Nothing is written outside the checkout and the temporary folder. Tests wait for processes more than they compute:
# two at a time. Compiled modules are kept whatever the environment says: some 100 processes import them. Benchmarks run
# alone on the machine. PYTEST_ARGS replaces the choice of files and workers.
DEFAULT := not slow and not gpu and not browser and not benchmark
TWO := -n 2 --dist loadfile --no-loadscope-reorder
pytest = home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT INT TERM && \
	DDRAY_HOME="$$home" PYTHONDONTWRITEBYTECODE= $(PY) -m pytest

test: $(VENV)/.installed-test
	@$(pytest) -m "$(DEFAULT)" $(or $(PYTEST_ARGS),$(TWO))

slow: $(VENV)/.installed-test
	@$(pytest) -m "slow and not gpu and not browser and not benchmark" $(or $(PYTEST_ARGS),$(TWO))

bench: $(VENV)/.installed-test
	@$(pytest) -m "benchmark and not slow and not gpu" tests/benchmarks $(PYTEST_ARGS)

browser: $(VENV)/.installed-browser
	@$(pytest) -m browser tests/browser $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

# Pages are linked into one folder, where the links between them are those of the checkout.
docs: $(VENV)/.installed-docs
	@rm -rf build/pages && mkdir -p build/pages
	@for page in README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs reports configs search_spaces; do \
		ln -s "$(CURDIR)/$$page" build/pages/; done
	$(PY) -m mkdocs build

# Measures what reports/ holds (hours on 2 cores; CIFAR-10 is looked for in $$DDRAY_DATA).
reports: $(VENV)/.installed-test
	$(VENV)/bin/python reports/regenerate.py
	$(VENV)/bin/python reports/diffusion.py

# What was cut off goes on; CIFAR-10 is looked for in $$DDRAY_DATA.
claims: $(VENV)/.installed-run
	$(PY) -m reports.claims

# Needs a GPU and a Python with torch, but no network: takes the environment of `make demo` if it is there, else $(PYTHON).
# `make -n gpu` prints the plan with its minutes. gpu-wheels fetches, where there is a network, what such a machine lacks.
gpu:
ifneq (,$(findstring n,$(firstword -$(MAKEFLAGS))))
	+@$(PYTHON) -m reports.gpu --plan
endif
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m reports.gpu

gpu-wheels: $(VENV)/.installed-run
	$(PY) -m reports.gpu --wheels

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find ddray tests -name __pycache__ -type d -prune -exec rm -rf {} +
