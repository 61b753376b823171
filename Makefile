# make demo    train on real data with SGDM, SAM and WSAM, and check fused against eager
#              METHOD="GSAM ESAM" shows these in place of WSAM
# make test    run the tests
# make parity  run the tests that compare methods and write what they find into docs/methods.md
# make sanitize  test the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and
#              ThreadSanitizer (GCC's; no GPU is needed)
# make coverage  lines of csrc/ that the tests of the kernels reach, then lines and branches of
#              wsam_fused/ that the whole suite reaches; PART=csrc or PART=python for one of them
# make bench   measure against the other implementations (on a GPU: benchmarks/gpu_report.sh)
# make wheel   build a wheel and a source distribution into dist/ (README.md: Install)
# make lint    check formatting, style and types        make format  apply the formatting
#
# Every target sets up what it needs and may be run again. A torch that the active environment
# (PYTHON) has is used as it is; else everything is installed into .venv.

PYTHON ?= python3
STAMP := build/environment
RUN := . $(STAMP) && "$$ENVIRONMENT_PYTHON"
CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

PARITY_TESTS := $(addprefix tests/test_,golden.py update.py per_sample.py microbatches.py \
	triton_interpreted.py)

.PHONY: demo test parity sanitize coverage bench wheel lint format environment clean

demo: environment
	$(RUN) -m benchmarks.demo $(if $(METHOD),--method $(METHOD))

test: environment
	$(RUN) -m pytest -q

parity: environment
	$(RUN) -m pytest -q --differences build/differences.json $(PARITY_TESTS)
	$(RUN) -m benchmarks.parity build/differences.json

sanitize: environment
	. $(STAMP) && .ci/sanitize "$$ENVIRONMENT_PYTHON"

coverage: environment
	. $(STAMP) && .ci/coverage "$$ENVIRONMENT_PYTHON" $(PART)

bench: environment
	$(RUN) -m benchmarks.bench_step
	$(RUN) -m benchmarks.bench_methods
	$(RUN) -m benchmarks.bench_host
	$(RUN) -m benchmarks.bench_training_memory
	$(RUN) -m benchmarks.bench_precision
	$(RUN) -m benchmarks.readme

wheel: environment
	. $(STAMP) && .ci/wheel "$$ENVIRONMENT_PYTHON" dist

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	. $(STAMP) && "$$(dirname "$$ENVIRONMENT_PYTHON")/clang-format" --dry-run -Werror $(CXX_SOURCES)

format: environment
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	. $(STAMP) && "$$(dirname "$$ENVIRONMENT_PYTHON")/clang-format" -i $(CXX_SOURCES)

environment:
	@PYTHON="$(PYTHON)" .ci/environment $(STAMP)

clean:
	rm -rf build dist .venv wsam_fused/_*.so *.egg-info
