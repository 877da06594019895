# Ravine. `make serve` and `make test` set up everything that they need in .venv; python3 (3.11 or newer) and make are enough.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
UV     ?= uv
# How many tests run at once, each with servers of its own. Many of them wait, so it is one more than a small machine's cores.
JOBS   ?= 3
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
EXTRAS  := --extra jit --extra privacy --extra tracing

.PHONY: help serve keys check test docs soak faults demo demo-workers bench bench-peers scale flame convergence oracles fuzz sbom audit lock clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.made:
	@echo "setting up $(VENV) …"
	@$(PYTHON) -c 'import sys; sys.exit("Ravine needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.made requirements.lock
	@echo "installing what the service needs …"
	@$(PIP) --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.test: $(VENV)/.serve requirements-test.lock pyproject.toml
	@echo "installing what the tests need …"
	@$(PIP) --require-hashes -r requirements-test.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.serve requirements-demo.lock
	@echo "installing what the demo needs …"
	@$(PIP) --require-hashes -r requirements-demo.lock
	@touch $@

serve: $(VENV)/.serve  ## run the service on the embedded store; ARGS="--port 9000" adds options
	@exec $(BIN)/python -m service serve $(ARGS)

keys: $(VENV)/.serve  ## the keys of those who may call it: ARGS="create --scope admin", "list", "revoke ID"
	@$(BIN)/python -m service keys $(ARGS)

check: $(VENV)/.test  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.test  ## the tests; ARGS="-k name" passes options on
	$(BIN)/python -m pytest -m "not soak" -n $(JOBS) --dist worksteal $(ARGS)

soak: $(VENV)/.test  ## 200 kills at random moments
	$(BIN)/python -m pytest -m soak $(ARGS)

faults: $(VENV)/.test  ## every fault, under load, and a table of what it cost; ARGS="--minutes 40 --seed 7 --only kill"
	$(BIN)/python -m tests.faults $(ARGS)

demo: $(VENV)/.demo  ## train digits with four optimizers over HTTP; writes two pictures
	$(BIN)/python examples/digits.py $(ARGS)

demo-workers: $(VENV)/.demo  ## many workers on one session: asynchronous, federated, DiLoCo, with liars; a picture of each
	for example in asynchronous federated diloco byzantine; do $(BIN)/python examples/$$example.py $(ARGS) || exit; done

bench: $(VENV)/.test  ## the benchmarks; writes benchmarks/RESULTS.md (ARGS="S1 L1" runs some, "--update S1 L1" writes them)
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: benchmarks/peers/.venv/.made  ## an environment with what `make bench` compares with (torch and others: gigabytes)

benchmarks/peers/.venv/.made: benchmarks/peers/requirements.txt
	@echo "installing what the benchmarks compare with …"
	@$(PYTHON) -m venv benchmarks/peers/.venv
	@benchmarks/peers/.venv/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

scale: $(VENV)/.test  ## what a request, a byte and a session cost, and what larger systems carry; writes benchmarks/scale.json, docs/scaling.md
	$(BIN)/python -m benchmarks.scale $(ARGS)

flame: $(VENV)/.test .venv-flame/.made  ## where the time of small and large steps goes; writes docs/flame-s1.svg, docs/flame-l1.svg, docs/performance.md
	$(BIN)/python -m benchmarks.flame --spy .venv-flame/bin/py-spy $(ARGS)

.venv-flame/.made: requirements-flame.lock
	@echo "installing what looks at a running process …"
	@$(PYTHON) -m venv .venv-flame
	@.venv-flame/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements-flame.lock
	@touch $@

convergence: $(VENV)/.test  ## in how many steps each kind minimizes; writes docs/convergence.md (ARGS="adam lamb": these alone)
	$(BIN)/python -m benchmarks.convergence --jobs 2 $(ARGS)

oracles: .venv-oracles/.made  ## run the libraries (gigabytes), compare with them, write the golden values anew
	PYTHONPATH=. .venv-oracles/bin/python tests/core/golden/make_golden.py
	PYTHONPATH=. .venv-oracles/bin/python tests/core/golden/make_golden.py --table

.venv-oracles/.made: pyproject.toml
	@echo "installing the libraries to compare with …"
	@$(PYTHON) -m venv .venv-oracles
	@.venv-oracles/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	@.venv-oracles/bin/python -m pip --disable-pip-version-check install --quiet --group oracles
	@touch $@

fuzz: .venv-fuzz/.made  ## random input for as long as told: ARGS="--minutes 60"; prints a table
	.venv-fuzz/bin/python -m tests.fuzz $(ARGS)

.venv-fuzz/.made: requirements-test.lock requirements-fuzz.lock
	@echo "installing what fuzzing needs …"
	@$(PYTHON) -m venv .venv-fuzz
	@.venv-fuzz/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements-test.lock -r requirements-fuzz.lock
	@touch $@

sbom: .venv-audit/.made  ## what the service is made of, as CycloneDX: sbom.json
	.venv-audit/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o sbom.json requirements.lock

audit: .venv-audit/.made  ## look up what is known to be wrong with what is installed; what cannot be looked up fails, too
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

.venv-audit/.made: requirements-audit.lock
	@echo "installing what looks at the dependencies …"
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements-audit.lock
	@touch $@

docs: $(VENV)/.test  ## make the pages of docs/ that come from the declarations in core/
	$(BIN)/ravine optimizers --markdown > docs/optimizers.md
	$(BIN)/ravine schedules --markdown > docs/schedules.md
	$(BIN)/ravine transforms --markdown > docs/transforms.md
	$(BIN)/ravine reducers --markdown > docs/reducers.md

lock:  ## resolve the dependencies anew (needs uv)
	$(COMPILE) $(EXTRAS) pyproject.toml -o requirements.lock
	$(COMPILE) $(EXTRAS) --group test -c requirements.lock pyproject.toml -o requirements-test.lock
	$(COMPILE) --group fuzz -c requirements-test.lock -o requirements-fuzz.lock
	$(COMPILE) --group audit -o requirements-audit.lock
	$(COMPILE) --group flame -o requirements-flame.lock
	$(COMPILE) --group demo -c requirements.lock -o requirements-demo.lock

clean:  ## remove what was set up (the data of the service stay)
	rm -rf $(VENV) .venv-oracles .venv-audit .venv-fuzz .venv-flame benchmarks/peers/.venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
