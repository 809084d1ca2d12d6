# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
DISTS := proto server client trainer
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help setup setup-dev demo serve test test-packaging check format bench memory fault mutate proto dist clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.runtime ## install Luthier into .venv

setup-dev: $(VENV)/.dev ## the same with the tools for tests and checks

$(VENV)/.runtime: constraints.txt $(DISTS:%=%/pyproject.toml)
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing Luthier (torch takes a minute)"
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install -c constraints.txt torch==2.13.0 $(DISTS:%=-e ./%) -e './trainer[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime pyproject.toml
	@echo "installing the tools for tests and checks"
	@$(PIP) install -c constraints.txt --group dev
	@touch $@

demo: setup ## train the example from upload to score, with live progress
	@$(BIN)/python examples/demo.py

serve: setup ## start luthierd for real use
	@exec $(BIN)/luthierd

# Most tests wait for real processes, so three workers keep two cores busy; more threads would only get in their way.
# Files in the order of their folders: those of few and long tests, which xdist would start last, come early.
test: setup-dev ## run the tests
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --ignore=tests/packaging -n 3 --dist loadfile --no-loadscope-reorder -q

test-packaging: setup-dev ## build the wheels, install the client from them, and act the images out
	@$(BIN)/python -m pytest -q tests/packaging

check: setup-dev ## format, lint, types, import rules, the contract and its generated code
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/check

format: setup-dev ## rewrite the code as `make check` wants it
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/buf format -w --path proto/luthier

fault: N ?= 500
fault: setup-dev ## inject N server kills, and other faults in proportion; goes on where it was stopped
	@cd tests && PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/python -m fault $(N)

mutate: N ?= 10000
mutate: setup-dev ## throw N mutated files and templates at a server; goes on where it was stopped
	@cd tests && PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/python -m mutations $(N)

bench: setup-dev ## measure against the peers and the limits; writes benchmarks/results
	@$(BIN)/python -m benchmarks

memory: setup-dev ## measure whether jobs take the memory that is foretold; writes benchmarks/results
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory

$(PROTO_VENV)/.ready: Makefile
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
		grpcio-tools==1.76.0 protobuf==6.33.6 mypy-protobuf==3.7.0 setuptools==80.9.0
	@touch $@

proto: setup-dev $(PROTO_VENV)/.ready ## generate the stubs from the contract
	@PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" $(BIN)/buf generate
	@$(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iproto -Iproto/third_party --grpc_python_out=proto/gen \
		$(patsubst %,proto/luthier/v1/%.proto,fine_tuning datasets models)
	@for stub in $$(find proto/gen -name '*_pb2_grpc.pyi'); do test -f "$${stub%i}" || rm "$$stub"; done

dist: setup-dev ## build the wheels, and gather what the client needs to install without an index
	@rm -rf dist && $(PIP) wheel --no-deps --wheel-dir dist $(DISTS:%=./%)
	@$(PIP) download -c constraints.txt --find-links dist --dest dist dist/luthier_client-*.whl && ls dist

clean: ## remove what make made
	rm -rf $(VENV) $(PROTO_VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
