# Each target sets up what it needs: a virtual environment in .venv, once.
#
#   make PYTHON=python3.12 demo             another interpreter (3.11 or later)
#   make TORCH='torch==2.13.0+cu128' demo   another torch: a requirement or a wheel; where pip
#                                           looks for it is pip's configuration (PIP_INDEX_URL, ...)

PYTHON ?= python3
VENV   ?= .venv
# Pinned, and installed first: an open range takes the newest build, gigabytes of CUDA with it,
# even where pip has a CPU build of this version at hand.
TORCH  ?= torch==2.13.0
MODE   ?= lora
ARGS   ?=
YES    ?=

python := $(VENV)/bin/python
# The name holds TORCH, so that another TORCH sets up again.
ready  := $(VENV)/.ready-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))

# The distribution's pyverbs alone, if it is built for this interpreter: where the host has an RDMA device, `make test`
# then runs the tests that are marked `verbs`.
define link_pyverbs
suffix=$$($(python) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'); \
site=$$($(python) -c 'import sysconfig; print(sysconfig.get_path("platlib"))'); \
for module in /usr/lib/python3/dist-packages/pyverbs/device$$suffix \
  /usr/lib64/python3*/site-packages/pyverbs/device$$suffix; do \
  [ ! -e "$$module" ] || [ -e "$$site/pyverbs" ] || ln -s "$${module%/*}" "$$site/pyverbs"; done
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-rdma test-rdma-source lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 18

# `exec`: no shell stands between the terminal and the program, so that a signal reaches it.
demo: $(ready)  ## a server and three silos train one model on this machine (MODE=lora|full, ARGS=...)
	@exec $(python) -m fedllm demo --mode $(MODE) $(ARGS)

test: $(ready)  ## the test suite (ARGS='-k name')
	@exec $(python) -m pytest $(ARGS)

test-rdma: $(ready)  ## the verbs tests, in a virtual machine with a soft-RoCE device (asks; YES=1 does not)
	@exec $(python) -m tests.softroce test $(if $(filter 1,$(YES)),--yes)
	@exec $(python) -m pytest --softroce -m softroce tests/softroce

test-rdma-source: $(ready)  ## the same with the newest pyverbs, built from source (four minutes, once)
	@exec $(python) -m tests.softroce test --source $(if $(filter 1,$(YES)),--yes)

lint: $(ready)  ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

bench: $(ready)  ## aiordma against raw sockets (ARGS='--quick --json out.json')
	@exec $(python) -m aiordma bench $(ARGS)

clean:  ## remove what the targets made, but keep runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: a set-up that failed or was interrupted starts again.
$(ready): pyproject.toml Makefile
	@rm -f $(VENV)/.ready-*
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "aiordma needs Python 3.11 or later as '$(PYTHON)': make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet '$(TORCH)'
	$(python) -m pip install --quiet -e '.[fedllm,uvloop,test,dev]'
	@$(link_pyverbs)
	@touch $@
