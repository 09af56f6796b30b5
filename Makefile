# make demo   sets everything up and shows a cluster at work
# make test   sets everything up and runs every test
PY      := .venv/bin/python
WORKERS ?= 3
SUITE   ?= cni
DATAPATH ?= nftables
BENCH   ?= cni

.DEFAULT_GOAL := demo
.PHONY: setup demo test lint format bench conformance clean

setup:
	@tools/setup

demo: setup
	@$(PY) -m podwire.lab.demo

# In the order of collection: the suites of cases are single tests and long, and come first.
test: setup
	@$(PY) -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: setup
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/lint-imports
	@.venv/bin/pyright

format: setup
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

# CASES=DIR runs any folder of cases; the default is the shared one, skipped where it is missing.
# ROUTING=vxlan: netpol with the overlay between the nodes.
conformance: setup
	@$(PY) -m tests.conformance --suite $(SUITE) --datapath $(DATAPATH) \
		$(if $(ROUTING),--routing $(ROUTING)) $(if $(CASES),--cases $(CASES))

bench: setup
	@$(PY) -m bench.$(subst -,_,$(BENCH)) $(ARGS)

clean:
	rm -rf .venv .setup build podwire/built
