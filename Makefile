# `make` says what there is. Every target makes .venv by itself from python3 >= 3.11, pip and make; a second start installs nothing.
# Another Python: `make PYTHON=/path/to/python3.13 ...` (after `make clean`, when a .venv is there already).

PYTHON ?=
VENV   := .venv/bin/python
PIP    := $(VENV) -m pip --disable-pip-version-check

.PHONY: help run test check proof chaos bench lock clean
.DELETE_ON_ERROR:

help:
	@echo 'make run      the gateway with a Valkey, a PostgreSQL and a demo AI router of its own; Ctrl-C ends it'
	@echo 'make test     the tests; one of them: make test ARGS="tests/limits -k window"'
	@echo 'make check    lint, format, types, and who may import whom'
	@echo 'make proof    storms, transfers, fuzzers and floods in their full size, on both kinds of server; an hour and more'
	@echo 'make chaos    gateways and stores that are killed, stalled, emptied: make chaos ARGS="--seconds 60 --seed 1 --redis none"'
	@echo 'make bench    the load run: CPU and latency per request and event, against httpx, nginx and Envoy where installed'
	@echo 'make lock     the lock files again from pyproject.toml; newest versions: make lock UPGRADE=--upgrade'
	@echo 'make clean    removes .venv and tool caches; keeps .gateway/, the data of make run'

run: .venv/.run
	@$(VENV) -m gateway run $(ARGS)

# Two at a time, file by file: most of a test's time is waiting for somebody. ARGS="-n0 ..." runs one after the other.
test: .venv/.dev
	@$(VENV) -m pytest -n2 --dist=loadfile $(ARGS)

check: .venv/.dev
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy
	.venv/bin/lint-imports

proof: .venv/.dev
	@$(VENV) -m pytest --full tests/walk tests/websocket tests/upstream tests/downstream tests/limits tests/stores tests/protocol tests/chaos $(ARGS)

chaos: .venv/.dev
	@$(VENV) -m tests.chaos $(ARGS)

bench: .venv/.dev
	@$(VENV) -m bench $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# -- Locks: versions and hashes, no index; each holds to the versions of the one before it ----------------------------------------

COMPILE = $(VENV) -m uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock' $(UPGRADE)

lock: .venv/.dev
	$(COMPILE) pyproject.toml -o requirements.lock
	$(COMPILE) pyproject.toml --extra embedded --group build -c requirements.lock -o requirements-embedded.lock
	$(COMPILE) --group dev -c requirements-embedded.lock -o requirements-dev.lock

# -- The environment --------------------------------------------------------------------------------------------------------------

# $(call install,LOCK): names each package as pip comes to it; pip's warnings and errors pass as they are. The stamp $@ is
# made on the left of the pipe, because only there is pip's verdict known to a plain sh.
define install
@rm -f $@
@echo 'Installing $(1)'
@($(PIP) install --progress-bar off --require-hashes -r $(1) && touch $@) | while read -r word name _; do \
	case $$word in Collecting) echo "  fetching $$name";; Installing) echo '  unpacking';; esac; done; test -e $@
endef

.venv/.run: $(VENV) requirements-embedded.lock pyproject.toml
	$(call install,requirements-embedded.lock)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .

.venv/.dev: .venv/.run requirements-dev.lock
	$(call install,requirements-dev.lock)

# The newest Python that the locks have wheels for, by its real path: a venv on a link breaks quietly when the link moves on.
USABLE = import os, sys, ensurepip, venv; print(os.path.realpath(sys.executable)) if sys.version_info >= (3, 11) else sys.exit(1)

$(VENV):
	@for name in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3); do \
		python=$$("$$name" -c '$(USABLE)' 2>/dev/null) && break; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'No usable Python: this needs $(or $(PYTHON),python3) to be 3.11 or newer, with its modules venv and ensurepip.' >&2; \
		echo 'Debian, Ubuntu: apt-get install python3-venv. One elsewhere: make PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi; \
	echo "Creating .venv with $$python"; \
	"$$python" -m venv --clear .venv || { rm -rf .venv; exit 1; }
