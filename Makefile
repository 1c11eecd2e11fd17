# SPDX-License-Identifier: Apache-2.0
#
# make test      build the kernels (CUDA too where nvcc is found) and run every test
# make demo      evaluate the Path-X checkpoint on 64 images: accuracy and a figure
# make bench     time attention against PyTorch's own
# make lint      what pre-commit checks; `make format` repairs what it can
# make transformers-tests   what transformers' source distribution ships of its model tests, on these kernels
# make kernels   only install, which rebuilds the kernels where a source changed
# make sanitize  every CUDA kernel under compute-sanitizer: memory errors and races
#
# Everything is installed once, into .venv. On a machine that has its own torch and no package index, use that one and
# install nothing: make test VENV= PYTHON=python3 (needs cmake >= 3.26, ninja, pytest).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS = -c constraints.txt
SOURCES := pyproject.toml $(shell find kernels -name '*.txt' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
CHECKPOINT ?= model_cards/pathx-16k-flash

ifeq ($(VENV),)
PY = PYTHONPATH="$(CURDIR)" $(PYTHON)
READY = flash_models/_kernels.so
else
PY = $(VENV)/bin/python
WITH_TOOLS = PATH="$(abspath $(VENV))/bin:$$PATH"
READY = $(VENV)/.installed
endif

.PHONY: test transformers-tests demo bench sanitize lint format kernels clean

test: $(READY)
	$(PY) -m pytest

# -o addopts=: their marks are not ours
transformers-tests: $(READY)
	version=$$($(PY) -c "import transformers; print(transformers.__version__)"); \
	mkdir -p build/transformers && $(PY) -m pip install --quiet parameterized && \
	$(PY) -m pip download --quiet --no-deps --no-binary transformers --dest build/transformers transformers==$$version && \
	tar -xzf build/transformers/transformers-$$version.tar.gz -C build/transformers && \
	TRANSFORMERS_SOURCE=build/transformers/transformers-$$version \
	    $(PY) -m pytest tests/test_transformers_suite.py -o addopts= -p no:warnings

demo: $(READY)
	$(PY) -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    --num_cpu_threads_per_process $$(nproc) \
	    eval/pathx.py --model_name_or_path $(CHECKPOINT) --num_eval_samples 64 --output_dir runs/demo
	@$(PY) -c "import json; r = json.load(open('runs/demo/all_results.json'))['results']['lra']; \
	    print('accuracy %.3f on %d images, drawn in runs/demo/sheet_lra.png' % (r['accuracy'], r['num_samples']))"

bench: $(READY)
	$(PY) eval/bench_attention.py

SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$(CURDIR)/build/sanitized" compute-sanitizer --error-exitcode 1
sanitize: $(READY)
	$(WITH_TOOLS) cmake -S kernels -B build/sanitize -G Ninja -DPython_EXECUTABLE="$$(command -v $(lastword $(PY)))" -DCMAKE_CUDA_FLAGS=-DFM_EVERY_LANE_ARRIVES
	$(WITH_TOOLS) cmake --build build/sanitize
	mkdir -p build/sanitized && cp -r flash_models build/sanitized/ && $(WITH_TOOLS) cmake --install build/sanitize --prefix build/sanitized --strip
	$(SANITIZE) --tool memcheck $(lastword $(PY)) tests/run_every_kernel.py
	-$(SANITIZE) --tool racecheck $(lastword $(PY)) tests/run_every_kernel.py > build/racecheck.log 2>&1
	@grep -E "^[0-9]+ calls" build/racecheck.log  # it came to its end
	@! grep "access at .*flash_models" build/racecheck.log  # cuBLAS's kernels race too, by its rules; told to skip them it crashes

lint: $(READY)
	$(WITH_TOOLS) pre-commit run --all-files

format: $(READY)
	$(WITH_TOOLS) ruff check --fix .
	$(WITH_TOOLS) ruff format .
	$(WITH_TOOLS) clang-format -i $$(find kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

kernels: $(READY)

clean:
	rm -rf build dist flash_models/_kernels.so

# torch first: the build reads its headers. The build tools come from the same environment, so that a later build finds
# the compiled files of this one still good.
$(VENV)/.packages: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(CONSTRAINTS) torch numpy
	$(VENV)/bin/pip install --quiet $(CONSTRAINTS) scikit-build-core cmake ninja
	touch $@

$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	$(WITH_TOOLS) pip install --quiet $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	$(PY) -c "import flash_models; print(flash_models.info())"
	touch $@

flash_models/_kernels.so: $(SOURCES)
	cmake -S kernels -B build/local -G Ninja -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/local
	cmake --install build/local --prefix . --strip
	touch $@
