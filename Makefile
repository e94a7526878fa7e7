# Every target sets up .venv by itself, and again when pyproject.toml or constraints.txt has changed.
# pip follows the environment's own configuration; nothing here names an index.
PYTHON ?= python3
VENV ?= .venv
# The tested versions; `make CONSTRAINTS=` takes the newest ones that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Passed on: `make test ARGS="-k stability"`, `make bench ARGS=--json`.
ARGS ?=

BIN := $(VENV)/bin
PIP_OPTIONS := --disable-pip-version-check --quiet install $(CONSTRAINTS:%=--constraint %)
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)

.DELETE_ON_ERROR:
.PHONY: help install uninstall systemd-check demo test test-fast coverage lint bench chaos fuzz \
	structure constraints wheel-check clean

help:
	@echo "make demo         a real chest X-ray, and what is none, through the real daemon"
	@echo "make test         the whole test suite"
	@echo "make test-fast    the quick part of it, without the real command and TensorFlow"
	@echo "make coverage     which lines and branches the suite runs, subprocesses included"
	@echo "make lint         ruff and mypy"
	@echo "make bench        what each stage costs, as ratios"
	@echo "make chaos        faults injected into the real daemon: nothing lost, nothing doubled"
	@echo "make fuzz         damaged files by the thousand, guided by coverage"
	@echo "make structure    size and shape of the packages: files, lines, functions, import cycles"
	@echo "make constraints  pins the versions that make installs to the newest allowed"
	@echo "make wheel-check  the built wheel in an environment of its own, without TensorFlow"
	@echo "make systemd-check  systemd's own verdict on the units"
	@echo "make install      as a service of this machine; make uninstall: see systemd/README.md"
	@echo "make clean        removes what these make, .venv and demo-home included"

demo: $(VENV)/.base.stamp
	$(BIN)/python demo/demo.py

# Two workers more than processors, up to 8, for half of the tests wait for processes; each may load
# TensorFlow. A file stays with one worker, for its shared set-up; files start in their order,
# acceptance first, which waits most. ARGS="-n 0" is one process, as a debugger wants it.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, 2 + len(os.sched_getaffinity(0))))')
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev.stamp
	$(PYTEST) $(ARGS)

# Under two minutes on two cores. Other markers: pyproject.toml.
test-fast: $(VENV)/.dev.stamp
	$(PYTEST) -m "not slow and not tensorflow" $(ARGS)

# A page for each file in htmlcov/.
coverage: $(VENV)/.dev.stamp
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

lint: $(VENV)/.dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/packaging/link_tree.py $(VENV)/linked
	MYPYPATH=$(VENV)/linked $(BIN)/mypy -p lungwatch
	MYPYPATH=$(VENV)/linked $(BIN)/mypy demo bench chaos

bench: $(VENV)/.base.stamp
	$(BIN)/python bench/run.py $(ARGS)

chaos: $(VENV)/.base.stamp
	$(BIN)/python -m chaos $(ARGS)

fuzz: $(VENV)/.base.stamp
	$(PIP) --editable '.[fuzz]'
	$(BIN)/python fuzz/run.py $(ARGS)

# ARGS="--rev main~20 --list" compares with another revision and lists the names.
structure: $(VENV)/.made.stamp
	$(BIN)/python tests/packaging/structure.py $(ARGS)

constraints: $(VENV)/.made.stamp
	$(BIN)/python tests/packaging/pin.py

# Built by way of the sdist, so that both are proved and no stale build/ is picked up.
wheel-check: $(VENV)/.dev.stamp
	rm -rf $(VENV)/wheel-check
	@mkdir $(VENV)/wheel-check
	$(BIN)/python -m build --outdir $(VENV)/wheel-check/dist . > $(VENV)/wheel-check/log 2>&1 \
		|| { cat $(VENV)/wheel-check/log; exit 1; }
	$(PYTHON) -m venv $(VENV)/wheel-check/venv
	wheel=$$(ls $(VENV)/wheel-check/dist/*.whl) && \
	$(VENV)/wheel-check/venv/bin/python -m pip $(PIP_OPTIONS) "$$wheel[demo]"
	$(VENV)/wheel-check/venv/bin/python -P tests/packaging/wheel_check.py
	rm -rf $(VENV)/wheel-check

# As root; PYTHON, EXTRAS, WHEEL, DESTDIR and PURGE as in systemd/README.md.
install:
	PYTHON='$(PYTHON)' sh systemd/install.sh install

uninstall:
	sh systemd/install.sh uninstall

# `verify` asks for the command too, which is not there before it is installed.
systemd-check:
	@if ! command -v systemd-analyze >/dev/null; then \
		echo "skipped: systemd-analyze is not installed"; exit 0; fi; \
	set -e; units=$$(mktemp -d); trap 'rm -rf "$$units"' EXIT; \
	for unit in systemd/*.service systemd/*.timer; do \
		sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|' "$$unit" > "$$units/$${unit##*/}"; done; \
	systemd-analyze verify --man=no "$$units"/*; echo "verify: clean"; \
	for unit in systemd/*.service; do \
		systemd-analyze security --offline=yes --threshold=20 --no-pager "$$unit" > "$$units/said" \
			|| { tail -n 1 "$$units/said"; echo "$$unit: more exposed than 2.0"; exit 1; }; \
		tail -n 1 "$$units/said"; done

clean:
	if [ -e demo-home/.made-by-lungwatch-demo ]; then rm -rf demo-home; fi
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage*
	find core cli daemon db export models training tests demo bench chaos \
		-name __pycache__ -type d -prune -exec rm -rf {} +

# The base install has no TensorFlow and is all that the demo needs.
$(VENV)/.base.stamp: $(VENV)/.made.stamp pyproject.toml $(CONSTRAINTS)
	@echo "installing lungwatch into $(VENV)"
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev.stamp: $(VENV)/.made.stamp pyproject.toml $(CONSTRAINTS)
	@echo "installing lungwatch with TensorFlow and the tools into $(VENV): some minutes at first"
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.base.stamp $@

$(VENV)/.made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit("lungwatch needs Python 3.11 or newer; this is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@
