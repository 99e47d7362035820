# Every target makes the virtual environment it needs from Python alone. pip is configured as usual (PIP_INDEX_URL, ...),
# for example to take PyTorch's CPU build.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=

.PHONY: demo kernel test slow pretend emulate matrix lint docs doctor verify bench clean
demo: $(VENV)/examples ## train a small GPT with both losses and write runs/demo/report.html
	$(BIN)/python -m examples.train_gpt $(ARGS)

kernel: $(VENV)/analysis ## a first look at the loss kernel of the GPT that demo left in runs/demo
	$(BIN)/python -m harmonic_triton loss-kernel examples.loss_kernel.gpt:from_checkpoint \
		--entry-arg run=runs/demo --entry-arg tokens=2000 --quick $(ARGS)

test: $(VENV)/test ## every test but the slow ones; the twenty that took longest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -q --durations=20 $(ARGS)

slow: $(VENV)/test ## the tests that take long
	$(BIN)/python -m pytest -m slow $(ARGS)

pretend: $(VENV)/test ## the tests that launch kernels, with every tensor held to where it would be on a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --pretend-gpu -m "triton and not slow" -n auto --maxprocesses 4 -q $(ARGS)

emulate: $(VENV)/test ## every kernel as compiled for sm_80 and sm_90, executed on the CPU; needs the emulator (tests/emulate)
	$(BIN)/python tests/emulate/emulation.py
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emulate -n auto --maxprocesses 4 --dist worksteal -q $(ARGS)

lint: $(VENV)/test ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: $(VENV)/core ## the wheel in clean environments, the oldest and the newest Python and torch; hours, see .ci/matrix
	$(PIP) build
	$(BIN)/python .ci/matrix $(ARGS)

docs: $(VENV)/docs ## the documentation, into build/docs; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict # with --quiet no warning would count

doctor: $(VENV)/core ## versions, devices, which backend serves and why not the others
	$(BIN)/python -m harmonic_triton doctor

verify: $(VENV)/core ## every backend against the fp64 reference on this machine
	$(BIN)/python -m harmonic_triton verify $(ARGS)

bench: $(VENV)/bench ## time, memory and accuracy beside the peers that run here
	$(BIN)/python -m benchmarks $(ARGS)

$(VENV)/core: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/examples: $(VENV)/core
	$(PIP) -e '.[examples]'
	touch $@

$(VENV)/analysis: $(VENV)/examples
	$(PIP) -e '.[examples,analysis]'
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) -e '.[test,examples,analysis,transformers,zarr]'
	touch $@

$(VENV)/docs: $(VENV)/core
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/bench: $(VENV)/core
	$(PIP) -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
