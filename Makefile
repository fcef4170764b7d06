# Two commands matter: `make demo` and `make test`. Both set everything up in .venv on their first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The benchmark's peers need old versions, and so a Python and an environment of their own.
PEERS_PYTHON ?= python3.11
PEERS := .venv-peers
# One folder a demo: its runs, the comparison and the figure.
ifndef DEMO
DEMO := runs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)
endif
METHODS := meta_rkhs_i meta_rkhs_ii maml anil nearest_centroid

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format peers clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(STAMP): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	  { echo "Python 3.10 to 3.12 is needed, but there is no $(PYTHON). Install it, or name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@# From 3.13 on, numpy < 2, which learn2learn's qpth wants, is not built.
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	  { echo "Python 3.10 to 3.12 is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks its venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@echo "Installing (several GB with torch; about two minutes on a fast connection) ..."
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(STAMP)

install: $(STAMP)  ## Create .venv with everything, learn2learn included

demo: $(STAMP)  ## Train and compare the four methods on glyphs (6 to 10 minutes on 2 cores)
	@for method in $(METHODS); do \
	  $(BIN)/lightning-ntk train experiment=demo method=$$method run_dir=$(DEMO)/$$method || exit 1; \
	done
	@$(BIN)/lightning-ntk compare $(DEMO) baseline=maml

test: $(STAMP) lint  ## Lint and run all tests but the slow studies
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(PEERS)/installed: requirements-peers.txt
	@$(PEERS_PYTHON) -c 'import sys, ensurepip, venv; sys.exit(not (3, 9) <= sys.version_info < (3, 12))' || \
	  { echo "The peers need Python 3.9 to 3.11 with its venv module. Name one: make peers PEERS_PYTHON=python3.10" >&2; exit 1; }
	rm -rf $(PEERS)
	$(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25"
	@echo "Installing neural-tangents, jax and tensorflow (2 GB; about two minutes on a fast connection) ..."
	$(PEERS)/bin/python -m pip install --quiet --requirement requirements-peers.txt
	@touch $@

peers: $(PEERS)/installed  ## Create .venv-peers with neural-tangents, for the benchmark

clean:  ## Remove the environments and caches; runs stay
	rm -rf $(VENV) $(PEERS) build *.egg-info .pytest_cache .ruff_cache
