# The project's commands. Everything is installed into $(VENV), made from any Python of 3.11 or newer;
# once it is there, nothing needs a network. `make help` lists the commands.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
MADE_FROM := pyproject.toml constraints.txt
# --no-build-isolation: the editable install uses the pinned setuptools and fetches nothing.
# --no-compile: modules are compiled when first imported, and most of torch never is.
INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt
# Two processes, a file of tests in one of them; the slow tests use all cores themselves.
PARALLEL := -n 2 --dist loadfile
SLOW := $(BIN)/python -m pytest -m slow $(PYTEST_ARGS) tests

export PYTHONNOUSERSITE := 1
export PIP_USER := 0
unexport PYTHONPATH PYTHONHOME

.PHONY: help quickstart env test check test-slow docs clean
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart  environment, then real text to a model that writes, in a few minutes'
	@echo 'make test        environment with test tools, then every test that is not slow'
	@echo 'make check       format, lint, types, layering rules and unit tests'
	@echo 'make test-slow   the slow tests: kills, long runs, tutorials'
	@echo 'make docs        the documentation as a site, in build/site'
	@echo 'make env         the environment with test tools, and nothing else'
	@echo 'make clean       remove the environment and what tools cached (out/ stays)'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter, VENV=dir the place of the environment.'

quickstart: $(VENV)/.made-run
	$(BIN)/gristmill quickstart $(ARGS)

env: $(VENV)/.made-test

test: env
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL) $(PYTEST_ARGS) tests

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL) $(PYTEST_ARGS) tests/conventions tests/unit

# pytest leaves with 5 when it selects nothing: right only where no test is marked slow.
test-slow: env
	@echo '$(SLOW)'
	@code=0; $(SLOW) || code=$$?; \
	if [ $$code -eq 5 ] && ! grep -rqE --include='test_*.py' 'mark\.slow' tests; then \
	  echo 'no test is marked slow'; code=0; fi; exit $$code

# The variable keeps quiet a notice of the theme about its successor.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo 'the documentation is in build/site: open build/site/index.html, or for its search'
	@echo '$(BIN)/python -m http.server --directory build/site'

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The test environment is the run environment with more in it, so it counts as both.
$(VENV)/.made-test: $(VENV)/.made-venv $(MADE_FROM)
	@echo 'installing gristmill and its test tools into $(VENV) (a minute, more where packages must be downloaded)'
	@$(INSTALL) --no-build-isolation -e '.[test]'
	@touch $(VENV)/.made-run $@

$(VENV)/.made-run: $(VENV)/.made-venv $(MADE_FROM)
	@echo 'installing gristmill into $(VENV) (half a minute, more where packages must be downloaded)'
	@$(INSTALL) --no-build-isolation -e '.[fast]'
	@touch $@

$(VENV)/.made-venv:
	@if [ -z '$(PYTHON)' ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "gristmill needs Python 3.11 or newer ($(or $(PYTHON),python3):" \
	    "$$($(or $(PYTHON),python3) --version 2>/dev/null || echo not found))." \
	    'Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo '$(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv),' \
	    'then: make $(MAKECMDGOALS)' >&2; exit 1; fi
	@if ! command -v '$(firstword $(CXX))' >/dev/null && ! command -v clang++ >/dev/null; then \
	  echo 'warning: no C++ compiler found ($(CXX), clang++): training works, but uncompiled and slower.' \
	    'Debian, Ubuntu: apt-get install g++' >&2; \
	elif ! $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; then \
	  echo 'warning: Python.h not found: training works, but uncompiled and slower.' \
	    'Debian, Ubuntu: apt-get install python3-dev' >&2; fi
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools
	@touch $@
