# Two commands do all the set-up: `make repro` runs the pipeline, `make test` the tests.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: repro test test-models lint lock clean

repro: $(VENV)/installed
	dvc repro
	@python -m stages.report.show

# First what is fast, then whole runs of the pipeline, of one thread each; file by file in a process for each core.
test: $(VENV)/installed
	python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile
	python -m pytest -m slow -n auto --maxprocesses 4 --dist loadfile

# Public networks, family by family, and docs/families.md (the seconds of each are in it; all of them about half an hour of one core, up to 12 GB)
test-models: $(VENV)/installed
	python tests/models.py

lint: $(VENV)/installed
	ruff check .
	ruff format --check .

# Does dvc.lock belong to the code, the parameters and the pipeline of this commit?
lock: $(VENV)/installed
	python -m pytest tests/test_pipeline.py -k lock

$(VENV)/installed: requirements.txt requirements-test.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version)'
	@echo "Installing $$(grep -c == requirements.txt) pinned packages and what they need into $(VENV): torch with its GPU libraries is"
	@echo "most of it, about 6 GB on disk; this takes some minutes, once. Nothing outside this folder is changed but pip's cache."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV)
