# Each target sets up what it needs. A machine with Python 3.11, make and a C compiler is enough.
PYTHON   ?= $(shell command -v python3.11 || command -v python3)
PRESET   ?= ci
CHAPTERS ?=
JOBS     ?= 2
PORT     ?= 8000
VENV     := .venv
STAMP    := $(VENV)/.installed
BIN      := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help book test serve clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make book   run the chapters and build the site into _build/html"
	@echo "            CHAPTERS=\"02 A1\" builds a part, PRESET=gpu another size, JOBS=1 one chapter at a time"
	@echo "make test   build the book, then check that package and notebooks agree, lint, and run every test"
	@echo "make serve  show the built book at http://localhost:$(PORT)"
	@echo "make clean  delete what was built (the environment stays; 'rm -rf .venv' deletes that)"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none found"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed; $(PYTHON) is {v[0]}.{v[1]}")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

book: $(STAMP)  ## the site
	$(BIN)/python -m fmri_book.building --chapters "$(CHAPTERS)" --preset "$(PRESET)" --jobs $(JOBS)

test: $(STAMP)  ## everything that can be checked
	$(BIN)/python -m fmri_book.building
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n $(JOBS)

serve: $(STAMP)  ## the site, over http
	@test -f _build/html/index.html || $(MAKE) book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

clean:  ## leave only the sources and the environment
	rm -rf _build build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
