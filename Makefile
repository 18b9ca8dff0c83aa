# Everything runs in .venv, which the first target that needs it makes and installs once. Another Python: make PYTHON=...
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
LATEST := .venv-trl-latest
# What runs on a GPU takes .venv where it is, and else what the machine has: make PYTHON=...
OR_MACHINES := $(firstword $(wildcard $(BIN)/python) $(PYTHON))

# Threads wait without spinning. Where other programs use the cores too, small models train several times as fast.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-all test-hosts test-trl-latest test-configs test-classes test-gpu lint docs bench bench-gpu clean

help:  ## the targets
	@grep -hE "^[a-z-]+:.*## " $(MAKEFILE_LIST) | sed -E "s/^([a-z-]+):[^#]*## /  \1\t/" | expand -t 20

demo: $(INSTALLED)  ## train a small model on generated word problems, with cross-entropy and with the mix
	$(BIN)/python demo/run.py

# A worker that has done its part takes over from the other: single tests of hosts take a minute.
test: $(INSTALLED)  ## every law, family and host, with a sample of their combinations
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not matrix"

test-all: $(INSTALLED)  ## all combinations and the long checks too
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-hosts: $(INSTALLED) .deepspeed  ## real hosts in two processes: prints what works with what, and writes docs/compatibility.md
	COMPATIBILITY=docs/compatibility/axolotl.json $(BIN)/python -m pytest tests/distributed; \
	  status=$$?; $(BIN)/python tools/compatibility.py; exit $$status

# Beside .venv, as some libraries behave in another way where they find it. It needs torch to build.
.deepspeed: $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $@ \
	  deepspeed hjson msgpack ninja py-cpuinfo

# TRL's newest release and the transformers it wants, beside the one that Axolotl pins.
test-trl-latest:  ## the tests of TRL in an environment of their own
	test -x $(LATEST)/bin/pip || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet "torch==2.13.0"
	$(LATEST)/bin/python -m pip install --quiet --upgrade --editable ".[trl]" trl transformers accelerate peft "pytest>=8" pytest-xdist
	$(LATEST)/bin/python -m pip list | grep -E "^(torch|trl|transformers|accelerate|peft|datasets) "
	$(LATEST)/bin/python -m pytest -n 2 tests/hosts/test_trl.py tests/hosts/test_hosts_page.py \
	  tests/hosts/test_trainer.py tests/hosts/test_install.py tests/hosts/test_prune.py
	COMPATIBILITY=docs/compatibility/trl-latest.json $(LATEST)/bin/python -m pytest tests/distributed \
	  -k "cut or metrics or two_processes and FSDP2"; \
	  status=$$?; $(LATEST)/bin/python tools/compatibility.py; exit $$status

test-configs: $(INSTALLED)  ## the example configs of the installed Axolotl, from its source distribution, with cv_loss
	version=$$($(BIN)/python -c "from importlib.metadata import version; print(version('axolotl'))") && \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary axolotl --dest .axolotl axolotl==$$version && \
	HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 $(BIN)/python tools/axolotl_configs.py \
	  .axolotl/axolotl-$$version.tar.gz docs/compatibility/axolotl-configs.md

test-classes: $(INSTALLED)  ## every class of language models in transformers, in tiny form
	HF_HUB_OFFLINE=1 $(BIN)/python tools/classes.py

# DEVICE=pretended: on a device that is none, made of the CPU, where operations on tensors of two devices fail too.
test-gpu: DEVICE ?= cuda
test-gpu:  ## the tests of the engine, with their tensors on a CUDA device
	TEST_DEVICE=$(DEVICE) PYTHONPATH=$$PYTHONPATH:.:.gpu-packages $(OR_MACHINES) -m pytest -m "not slow and not matrix" tests/laws tests/test_diagnostics.py \
	  tests/test_families.py tests/test_fused.py tests/test_heads.py tests/test_kernels.py tests/test_losses.py \
	  tests/test_precision.py tests/test_sample.py tests/test_statistics.py

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the pages of docs/ as a site with search, docs/_build/index.html; a dead link fails
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build

bench: $(INSTALLED)  ## seconds and memory of the losses
	$(BIN)/python benchmarks/loss_cost.py

bench-gpu:  ## the engine on a CUDA device, beside others' losses: benchmarks/results/gpu.csv; ARGUMENTS="--minutes 9"
	$(OR_MACHINES) -c "import pydantic, pluggy, annotated_types" 2> /dev/null || $(MAKE) .gpu-packages
	$(OR_MACHINES) benchmarks/gpu.py $(ARGUMENTS)

# What a machine with PyTorch, Triton and transformers lacks; it may be carried to one without network. Liger is a peer.
.gpu-packages:
	$(PYTHON) -m pip install --quiet --target $@ annotated-types pluggy pydantic pytest
	$(PYTHON) -m pip install --quiet --target $@ --no-deps liger-kernel

clean:  ## what the targets above leave behind, but for .venv
	rm -rf demo-output outputs last_run_prepared build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and alone: pip then takes one that fits both Axolotl and the machine, and the rest follows it.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Installing Axolotl and the development tools into .venv. This happens once and takes several minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet "torch==2.13.0"
	@$(BIN)/python -m pip install --quiet --editable ".[axolotl,dev,docs]"
	@touch $@
