# Set-up and the everyday commands. Everything lives in .venv beside this file, so clones do not touch each other.
#
#   make quickstart   install, and train and score on the embedded sample: no GPU and no model hub needed
#   make test         install what tests need, and run all of them
#   make check        linters, types, and the site
#   make site         build the pages of docs/ into site/, and fail where they do not hold together
#   make audit        look up known vulnerabilities of the pinned packages; needs the advisories of the package index
#   make docs         regenerate the tables in docs/, and the tested set
#   make test-lowest  the unit, compiled and distributed tests with the lowest versions that pyproject.toml allows
#   make test-newest  the same with the newest versions of everything
#   make pin          make those of the last test-newest the tested set, constraints.txt
#   make clean        remove .venv and everything generated

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m qa_dist.machine.installation

# Environments of their own, with all extras. torch is the one of constraints.txt in both.
LOWEST := .venv-lowest
NEWEST := .venv-newest
WHOLE := '.[quickstart,quant,deepspeed,sentencepiece,cmrc,serve,onnx,tracking,dev]'
OF_LIBRARIES := tests/unit tests/compiled tests/distributed \
  $(addprefix tests/integration/test_,architectures.py search.py sweep.py traced_passes.py)
IN_TWO := --numprocesses 2 --dist loadfile $(or $(TESTS),$(OF_LIBRARIES))

.PHONY: quickstart test check site audit docs clean test-lowest test-newest pin

quickstart: $(VENV)/.quickstart
	PYTHON=$(BIN)/python bash launch/local.sh --config quickstart --output_dir outputs/quickstart $(ARGS)

# Four at a time on two cores: a test that starts ranks waits as long as it computes. Tests of a file stay together,
# they share what is costly to make (tests/support/scheduling.py); long files come first.
# Python may write the byte code that pip has left out: without it a process takes three times as long to start.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(VENV)/.dev site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Strict: a link to nothing, or a page that the menu leaves out, is a failure.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Strict: a package without an answer is a failure, not a pass.
audit: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

docs: $(VENV)/.dev
	$(BIN)/python -m qa_dist.machine.requirements pyproject.toml constraints.txt > $(VENV)/requirements.json
	mv $(VENV)/requirements.json qa_dist/machine/requirements.json
	$(BIN)/python -m qa_dist.documentation README.md docs/options.md docs/compatibility.md docs/results.md
	$(BIN)/python -m qa_dist.bench report docs/benchmarks/*.json --output docs/benchmarks.md
	$(BIN)/python -m qa_dist.bench memory report docs/memory/*.json --output docs/memory.md
	$(BIN)/python -m qa_dist.bench gpu report $(wildcard docs/gpu/*.jsonl) --output docs/gpu.md

# Warnings are no failures here: old packages do what newer ones, or torch, warn of.
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest -W default $(IN_TWO)

test-newest:
	[ -d $(NEWEST) ] || $(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c $(NEWEST)/constraints.txt -e $(WHOLE)
	$(NEWEST)/bin/python -m pytest $(IN_TWO)

# Then: make docs, and make test.
pin:
	$(NEWEST)/bin/python -m pip freeze --exclude-editable > $(NEWEST)/frozen.txt
	{ grep '^#' constraints.txt; sed 's/+[[:alnum:].]*$$//' $(NEWEST)/frozen.txt; } > $(NEWEST)/pinned.txt
	mv $(NEWEST)/pinned.txt constraints.txt

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) outputs site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Old versions have no wheels for new Pythons; the lowest Python that pyproject.toml allows belongs to them.
$(LOWEST)/.dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "the lowest versions are those for Python 3.11; name one with: make PYTHON=python3.11 test-lowest" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) -m qa_dist.machine.requirements --lowest pyproject.toml constraints.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e $(WHOLE)
	touch $@

# A stamp is written last: an interrupted installation is taken up again.
$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) '.[quickstart]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) '.[quickstart,quant,deepspeed,sentencepiece,cmrc,serve,onnx,dev]'
	touch $@ $(VENV)/.quickstart
