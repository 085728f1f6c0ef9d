# install · paper · plan · site · check · test · lab · refresh · models · archive · clean; each creates what it needs on first use.
# make paper PROFILE=real      other models, see notebooks/profiles/
# make paper ARGS=--explain    why a notebook would be run again (--dry-run: only which)
# make plan PROFILE=original   how long that would take on this machine, and what it needs
# make test NOTEBOOKS=notebooks   nbval on all notebooks, not on the quick ones alone

PROFILE ?= micro
NOTEBOOKS ?= $(wildcard notebooks/00_* notebooks/20_* notebooks/30_* notebooks/explore.ipynb)
BIN := .venv/bin
export PROFILE

.PHONY: paper plan site check test lab refresh models archive install clean

paper: install
	$(BIN)/pytask $(ARGS)

plan: export OMP_NUM_THREADS ?= 2
plan: install
	$(BIN)/python paper/forecast/forecast.py

site: .venv/site
	$(BIN)/python paper/site/build.py

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

archive: install
	$(BIN)/python paper/archive.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/site: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[site]'
	touch $@

clean:
	rm -rf build
