# GNU make and a Python 3.12 or 3.13 with venv are needed; everything else goes into .venv.
# ACCEL=cpu or ACCEL=cuda12 overrides the look for an NVIDIA driver, PYTHON=... the look for a Python,
# ARGS=... is passed on: make run ARGS="--config=configs/cifar10.py:trades", make test ARGS="-k pgd -x".

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-more test-slow test-long test-doors test-wheel test-docs faults lint format docs notebooks prepare-tf clean

ifndef ACCEL
ACCEL := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda12 || echo cpu)
endif
REQUIREMENTS_cpu := requirements-cpu.txt
REQUIREMENTS_cuda12 := requirements.txt
REQUIREMENTS := $(REQUIREMENTS_$(ACCEL))
ifeq ($(REQUIREMENTS),)
$(error ACCEL=$(ACCEL) is not known: say cpu or cuda12)
endif

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# On the PATH first, then where version managers keep theirs: the newest suitable one of each.
HOMES := $(foreach v,3.13 3.12,$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(v).*/bin/python$(v) \
  $(HOME)/.local/share/uv/python/cpython-$(v)*/bin/python$(v) \
  $(foreach c,miniconda3 anaconda3 miniforge3 mambaforge micromamba .conda,\
    $(HOME)/$(c)/bin/python$(v) $(HOME)/$(c)/envs/*/bin/python$(v)) \
  $(CONDA_PREFIX)/bin/python$(v)))
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3 $(HOMES))
# A version manager's shim can be on the PATH and still not run, and Debian's python3 can lack venv: so ask it.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))

# Stamps, so that nothing is installed again until a requirements file changes (or ACCEL does).
INSTALLED := $(VENV)/.installed-$(ACCEL)
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
# For the doors to other tools alone.
VENV_DOORS := .venv-doors
INSTALLED_DOORS := $(VENV_DOORS)/.installed

# "##N text" behind a target lists it in group N.
GROUPS := "1 To begin" "2 Before a change is merged" "3 Documents" "4 Data and upkeep"

help:
	@for group in $(GROUPS); do \
	  echo "$${group#* }"; \
	  sed -n "s/^\([a-z-]*\):.*  ##$${group%% *} /\1: /p" $(firstword $(MAKEFILE_LIST)) | \
	    awk '{name = $$1; sub(/:$$/, "", name); sub(/^[^ ]* /, ""); printf "  make %-12s %s\n", name, $$0}'; \
	  echo; \
	done
	@echo 'ARGS="..." is passed on: make run ARGS="--config=digits:trades".'
	@echo 'ACCEL=cpu|cuda12 and PYTHON=/path/to/python decide what .venv is made of.'

setup: $(INSTALLED)  ##1 make .venv, as every other target does if it is missing

$(INSTALLED): requirements-cpu.txt $(REQUIREMENTS)
	@if ! $(PY) -c '$(SUITABLE)' 2>/dev/null; then \
	  found=; \
	  for p in $(PYTHONS); do \
	    if "$$p" -c '$(SUITABLE)' 2>/dev/null; then found="$$p"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: none of [$(strip $(PYTHONS))] runs, is Python 3.12 or 3.13 and has venv; install one (Debian:" \
	         "apt install python3.13-venv; uv: uv python install 3.13; pyenv: pyenv install 3.13)" \
	         "or name it: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "$(VENV): $$("$$found" --version) ($$found)"; \
	  "$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "$(VENV): installing $(REQUIREMENTS)"
	@rm -f $(VENV)/.installed-*
	@if [ $(ACCEL) = cpu ]; then $(PY) -m pip uninstall -qy jax-cuda12-plugin jax-cuda12-pjrt 2>/dev/null || true; fi
	@$(PIP) -r $(REQUIREMENTS)
	@$(PIP) --no-deps -e .
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@echo "$(VENV): installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(INSTALLED_DOCS): requirements-docs.txt $(INSTALLED)
	@echo "$(VENV): installing requirements-docs.txt"
	@$(PIP) -r requirements-docs.txt
	@touch $@

run: $(INSTALLED)  ##1 train and evaluate digits, ClusTR + QTRADES: a few minutes
	$(PY) run.py $(ARGS)

demo: $(INSTALLED)  ##1 a CIFAR-10 network of ClusTR, attacked both ways
	$(PY) examples/demo.py $(ARGS)

# Most of their time is compilation: they do without XLA's optimiser, which the slow tests have.
test test-more test-doors: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
test: $(INSTALLED_DEV)  ##2 the tests that are not slow
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-more: $(INSTALLED_DEV)  ##2 those like them that would make it too long
	$(PY) -m pytest -n 2 --dist worksteal -m "more and not long" $(ARGS)

# Those of the doors are left to test-doors, which has their tools.
test-slow: $(INSTALLED_DEV)  ##2 the slow tests that CI runs
	$(PY) -m pytest -n 2 --dist worksteal -m "slow and not long and not more" --ignore-glob="*/test_doors*.py" $(ARGS)

test-long: $(INSTALLED_DEV)  ##2 the rest of the slow tests
	$(PY) -m pytest -n 2 --dist worksteal -m long $(ARGS)

# PyTorch and Foolbox stay out of .venv, whose versions are exact: CUDA's wheels of PyTorch and of JAX disagree.
# Their environment sees .venv's packages through a .pth file and installs the rest.
$(INSTALLED_DOORS): requirements-doors.txt $(INSTALLED_DEV)
	@echo "$(VENV_DOORS): installing requirements-doors.txt"
	@$(PY) -m venv --clear $(VENV_DOORS)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(VENV_DOORS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(VENV_DOORS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-doors.txt
	@touch $@

test-doors: $(INSTALLED_DOORS)  ##2 the doors to PyTorch and Foolbox, in .venv-doors
	$(VENV_DOORS)/bin/python -m pytest -n 2 --dist worksteal tests/test_doors*.py $(ARGS)

# The lower bounds of pyproject.toml are the pins, so the oldest JAX that is allowed is the one that is installed.
test-wheel: $(INSTALLED)  ##2 the wheel alone, with nothing but what it requires
	@rm -rf build/wheel build/core build/lib && mkdir -p build/empty
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	@$(PY) -m venv build/core
	@build/core/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-cpu.txt build/wheel/*.whl
	cd build/empty && ../core/bin/python ../../tests/core_only.py

faults: $(INSTALLED_DEV)  ##2 inject all faults of docs/reliability.md (ten minutes)
	FAULTS=all $(PY) -m pytest -q tests/test_faults*.py $(ARGS)

lint: $(INSTALLED_DEV)  ##2 ruff and pyright; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(INSTALLED_DEV)  ##2 mend what ruff can mend by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(INSTALLED_DOCS)  ##3 the documentation as a site: docs/_build/index.html
	$(PY) -m sphinx -W --keep-going -E -q -b html docs docs/_build $(ARGS)
	@echo "docs/_build/index.html"

test-docs: docs $(INSTALLED_DEV)  ##3 its pages in a real browser, at three widths, light and dark
	SITE=docs/_build $(PY) -m pytest tests/test_docs_site.py $(ARGS)

notebooks: $(INSTALLED_DEV)  ##3 execute examples/*.py into their notebooks (minutes)
	$(PY) examples/notebooks.py $(ARGS)

# Only for making data sets: TFDS's CIFAR builder opens its downloads with TensorFlow. Prepared sets are read without.
prepare-tf: $(INSTALLED)  ##4 add TensorFlow, once, to download and prepare a data set
	$(PIP) -c requirements-cpu.txt tensorflow-cpu==2.21.0

clean:  ##4 remove .venv and caches; runs/ and data stay
	rm -rf $(VENV) $(VENV_DOORS) build docs/_build docs/tutorials *.egg-info .pytest_cache .ruff_cache .hypothesis
