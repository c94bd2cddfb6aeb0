# Each target sets up what it needs in .venv/, from nothing but Python 3.11 and make.
#   make PYTHON=python3.11 demo           another Python for the environment
#   make test ARGS="-k mask -x"           more arguments for demo, test or bench

PYTHON ?= python3
ARGS =
# CPU threads of the demo (accelerate alone would use one). Its model is tiny: more than eight only wait for each other.
THREADS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

BIN = .venv/bin
# Python compiles what it imports. Compiling all 15,900 files of the libraries takes about a minute.
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
TORCH = $(shell sed -n 's/^torch==//p' requirements.txt)
CHECK_TORCH = $(BIN)/python -c "import sys, torch; found = torch.__version__; found.startswith('$(TORCH)') or sys.exit( \
	'error: torch ' + found + ' is installed, but requirements.txt pins $(TORCH): another package replaced it. ' \
	'Run make clean, then this again.')"

LAUNCH = OMP_WAIT_POLICY=PASSIVE $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 \
	--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.DEFAULT_GOAL := help
.PHONY: help demo demo-sd3 test test-quick chaos quality format bench true-sizes clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.requirements ## fine-tune the tiny SDXL in examples/ with LPL on the CPU or a GPU; pictures in runs/demo/
	@echo "Fine-tuning the tiny SDXL of examples/tiny-sdxl with the latent perceptual loss: on a GPU if there is one, else on $(THREADS) CPU threads."
	@echo "Results go to runs/demo; the last lines name the pictures to look at."
	$(LAUNCH) train_sdxl_lpl.py --use_lpl --output_dir runs/demo $(ARGS)

demo-sd3: .venv/.requirements ## the same with the tiny Stable Diffusion 3; pictures in runs/demo-sd3/
	@echo "Fine-tuning the tiny Stable Diffusion 3 of examples/tiny-sd3 with the latent perceptual loss."
	@echo "Results go to runs/demo-sd3; the last lines name the pictures to look at."
	$(LAUNCH) train_sd3_lpl_flow.py --use_lpl --output_dir runs/demo-sd3 $(ARGS)

test: .venv/.requirements-dev ## run all tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# One training of each kind of recipe, whose losses are known, stands for the others.
test-quick: .venv/.requirements-dev ## run the unit tests and the trainings whose losses are known
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit \
		tests/recipes/test_train_sdxl.py::test_golden_curve tests/recipes/test_train_sd3.py::test_golden_curve \
		tests/recipes/test_twins.py $(ARGS)

chaos: .venv/.requirements-dev ## kill training runs 200 times at random moments, and see that nothing is lost
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.chaos $(ARGS)

quality: .venv/.requirements-dev ## check style and formatting with ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: .venv/.requirements-dev ## put right what ruff can: imports, simple faults, formatting
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: .venv/.requirements ## measure time and memory of the loss on an SDXL-sized decoder
	$(BIN)/python benchmarks/bench_lpl.py $(ARGS)

true-sizes: .venv/.requirements ## train, resume and export SDXL and SD3.5 medium at true sizes on the CPU, with random weights
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/gpu_check.py --work runs/true-sizes --device cpu --resolution 256 \
		--limit 7200 --results runs/true-sizes/results --only machine lifecycle-sdxl single-file-sdxl \
		lifecycle-sd3 single-file-sd3 $(ARGS)

clean: ## remove .venv/ and the tools' caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv makes, so an environment that was left half made is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: this needs Python 3.11 or newer as $(PYTHON); name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv .venv

# torch goes first and alone, so that no other package chooses its build.
.venv/.requirements: requirements.txt | $(BIN)/pip
	@echo "Installing torch $(TORCH): the largest download, once ..."
	@$(PIP_INSTALL) torch==$(TORCH)
	@echo "Installing the rest of requirements.txt ..."
	@$(PIP_INSTALL) -r requirements.txt
	@$(CHECK_TORCH)
	@touch $@

.venv/.requirements-dev: requirements-dev.txt .venv/.requirements
	@echo "Installing what tests, style checks and pretraining need ..."
	@$(PIP_INSTALL) -r requirements-dev.txt
	@$(CHECK_TORCH)
	@touch $@
