# Two commands do everything on a fresh Debian or Ubuntu machine, as root or with sudo:
#
#   make demo    install what is missing, build the two-node lab, trace a packet through it
#   make test    install what is missing, run every test
#
# Further: make install (netlab on the path), make lint, make bench, make report, make lock, make clean. docs/install.md tells what is installed.

# su without "-" leaves the directories of ip and iptables out.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
SUDO ?= sudo
ROOT := $(if $(filter 0,$(shell id -u)),,$(SUDO))
# Arguments for pytest, as in: make test PYTEST='-k trace -x'
PYTEST ?= -n 2

# Run as root, then give what that wrote in somebody's checkout (bytecode, caches) to its owner.
OWNER := $(shell stat -c %u:%g .)
AS_ROOT = status=0; $(ROOT) $(1) || status=$$?; \
	[ $(OWNER) = 0:0 ] || $(ROOT) find . -xdev -user 0 -exec chown -h $(OWNER) {} +; exit $$status

# Benchmarks, as a report in a directory; make report AMOUNT=--full for more of each.
REPORT ?= report
AMOUNT ?=

.PHONY: demo test lint bench report lock clean environment install uninstall

# NETLAB_LAB gives the demo's lab another name; sudo would drop it.
DEMO := .venv/bin/netlab up two-node-vxlan$(NETLAB_LAB:%= --lab %)
DEMO_LAB := $(or $(NETLAB_LAB),two-node-vxlan)
DEMO_TRACE := .venv/bin/netlab trace --lab $(DEMO_LAB) pod1 svc/myblog
demo:
	@./bootstrap.sh use
	@echo '$$ $(ROOT:%=% )$(DEMO)'
	@$(call AS_ROOT,$(DEMO))
	@echo '$$ $(ROOT:%=% )$(DEMO_TRACE)'
	@$(call AS_ROOT,$(DEMO_TRACE))
	@echo 'The lab stays up. Ask the Service yourself, then take the lab down:'
	@echo '  $(ROOT:%=% ).venv/bin/netlab exec --lab $(DEMO_LAB) pod1 -- curl -s http://10.99.174.93/hostname'
	@echo '  $(ROOT:%=% ).venv/bin/netlab down $(DEMO_LAB)'

# A link, so that sudo finds the command too. PREFIX says where.
PREFIX ?= /usr/local
NETLAB := $(CURDIR)/.venv/bin/netlab
install:
	@./bootstrap.sh use
	@if [ -e $(PREFIX)/bin/netlab ] && [ "$$(readlink $(PREFIX)/bin/netlab)" != $(NETLAB) ]; then \
		echo 'netlab: $(PREFIX)/bin/netlab is there already, and not ours' >&2; exit 3; fi
	$(ROOT) ln -sfn $(NETLAB) $(PREFIX)/bin/netlab

uninstall:
	@if [ "$$(readlink $(PREFIX)/bin/netlab)" = $(NETLAB) ]; then \
		$(ROOT) rm $(PREFIX)/bin/netlab; fi

environment:
	@./bootstrap.sh test

test: environment
	@$(call AS_ROOT,.venv/bin/python -m pytest $(PYTEST))

lint: environment
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench:
	@./bootstrap.sh bench
	@$(call AS_ROOT,.venv/bin/python -m pytest benchmarks)

# setuptools builds the package itself, without fetching anything more.
UV_COMPILE = echo 'setuptools>=77' | uv pip compile --quiet --upgrade --universal \
	--python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command 'make lock'

report: environment
	@mkdir -p $(REPORT)
	@$(call AS_ROOT,.venv/bin/netlab bench lookup $(AMOUNT) --report $(REPORT)/lookup.json)
	@$(call AS_ROOT,.venv/bin/netlab bench sync $(AMOUNT) --report $(REPORT)/sync.json)
	.venv/bin/netlab bench report $(REPORT)/lookup.json $(REPORT)/sync.json \
		--report $(REPORT)/report.html --report $(REPORT)/report.md --report $(REPORT)/report.csv

lock:
	@command -v uv >/dev/null || { echo 'netlab: make lock needs uv (pip install uv)' >&2; exit 3; }
	$(UV_COMPILE) --output-file requirements.lock pyproject.toml -
	$(UV_COMPILE) --output-file requirements-dev.lock --constraint requirements.lock \
		--extra dev pyproject.toml -

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
