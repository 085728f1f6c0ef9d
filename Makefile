# paper · check · test · lab · refresh · models · clean; each creates the environment first if it is not there.
# make paper PROFILE=real      other models, see notebooks/profiles/
# make paper ARGS=--explain    why a notebook would be run again (--dry-run: only which)
# make test NOTEBOOKS=...      nbval on these notebooks alone

PROFILE ?= micro
NOTEBOOKS ?= notebooks
BIN := .venv/bin
export PROFILE

.PHONY: paper check test lab refresh models install clean

paper: install
	$(BIN)/pytask $(ARGS)

check: install
	$(BIN)/python -m chassis_utils.paper.check

test: export OMP_NUM_THREADS = 1
test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile
	$(BIN)/pytest -n 2 --dist loadfile --nbval --nbval-cell-timeout=900 $(NOTEBOOKS)

lab: install
	$(BIN)/jupyter lab notebooks/index.ipynb

refresh: override PROFILE = micro
refresh: paper
	$(BIN)/python -m chassis_utils.paper.refresh
	$(BIN)/jupyter execute --inplace notebooks/explore.ipynb
	$(BIN)/python notebooks/tidy.py notebooks/explore.ipynb

models: install
	$(BIN)/python models/real.py
	$(BIN)/python models/news.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build
