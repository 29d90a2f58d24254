# `make demo` and `make test` set themselves up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
PAGES := $(wildcard nbs/[0-9]*.ipynb nbs/tutorials/*.ipynb nbs/howto/*.ipynb nbs/explanations/*.ipynb) nbs/benchmarks.ipynb nbs/evidence.ipynb nbs/gallery.ipynb nbs/index.ipynb
TEMPLATES := affinity stage transfer_path report grid

.PHONY: help install demo test test-slow test-browser docs notebooks export readme record transfer compare grid recipes evidence bench lab clean

help:
	@echo "make demo       a phantom zoo, its affinity, a chosen path, three trained arms, a report (about 5 minutes)"
	@echo "make test       the notebooks' own tests, pytest, and the gates (about 50 minutes on two cores)"
	@echo "make test-slow  the cells of the notebooks that make test leaves out, so that no page takes it longer than a minute (under 3 minutes)"
	@echo "make test-browser  the heatmap in a real browser: JupyterLab and the page without a kernel (installs Debian's Chromium; about 1 minute)"
	@echo "make docs       build the site with Quarto"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make export     package and templates from the notebooks; make readme: README.md from nbs/index.ipynb"
	@echo "make notebooks  execute every notebook in place, clean, export, readme"
	@echo "make record     run demo and test in a fresh clone and keep what they printed for the README"
	@echo "make transfer   does transfer between phantom tasks look like transfer? trains 16 sources for 4 targets, five seeds (about 30 minutes)"
	@echo "make compare    all arms of the protocol on a phantom target with three seeds (about 15 minutes)"
	@echo "make grid       every sequence of two of six phantom sources, for two targets and three seeds (under 15 minutes)"
	@echo "make recipes    one set of source models fine-tuned under nine recipes, on real MRI (DATA=../shared; about two hours on one core)"
	@echo "make evidence   is the recommendation right, on real MRI and on a phantom zoo of uneven sizes? (DATA=../shared; hours on two cores, goes on where it was)"
	@echo "make bench      the affinity against reading the files and the paper's loop; the training loop against its passes alone; the engine against the function it calls (about 25 minutes; 0.7 GB of phantom volumes stay in the cache)"
	@echo "make clean      remove what demo left; the environment stays"

install: $(READY)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "seqtransfer needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": run make PYTHON=python3.12, say.")'
	@echo "Setting up $(VENV): about 2.5 GB, one to a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/seqtransfer phantom demo/zoo --like nnunet --size 48 --cases 16 --seed 0
	$(BIN)/seqtransfer tasks demo/zoo
	$(BIN)/seqtransfer run demo/zoo --target LesionC-FLAIR-WMH --arms scratch,scratch-total,direct-choice,sequential --out demo/run

# One thread a notebook: two run at a time, and more threads than cores are slower than too few.
test: $(READY)
	OMP_NUM_THREADS=1 SEQTRANSFER_CACHE=$(abspath $(VENV))/cache $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/browser -n 2 --dist loadfile

# The pages that have cells marked `#| slow`, with them.
test-slow: $(READY)
	for page in $$(grep -rl --include='*.ipynb' --exclude-dir=_proc --exclude-dir=.ipynb_checkpoints '"#| slow' nbs); do OMP_NUM_THREADS=1 SEQTRANSFER_CACHE=$(abspath $(VENV))/cache $(BIN)/nbdev_test --flags slow --path $$page || exit 1; done

# Debian's Chromium; where there is no apt-get, a Chromium or Chrome that is there will do.
test-browser: $(READY)
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || { echo "There is no Chromium, and it could not be installed: install it (Debian: sudo apt-get install chromium), then run make test-browser again."; exit 1; }
	$(BIN)/python -m pytest tests/browser

# With a cache of their own that is empty, so that no page says what an older version of the code left there.
notebooks: $(READY)
	$(MAKE) export
	rm -rf $(VENV)/pages
	SEQTRANSFER_CACHE=$(abspath $(VENV))/pages $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(PAGES)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(TEMPLATES:%=nbs/experiments/%.ipynb)
	$(BIN)/jupyter nbconvert --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True $(PAGES)
	$(BIN)/python nbs/records/tidy.py
	$(BIN)/nbdev_clean
	$(MAKE) export readme

export: $(READY)
	$(BIN)/nbdev_export
	@mkdir -p seqtransfer/experiments
	@for t in $(TEMPLATES); do $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --clear-output --stdout nbs/experiments/$$t.ipynb > .part && mv .part seqtransfer/experiments/$$t.ipynb || exit 1; done

readme: $(READY)
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide_input --TagRemovePreprocessor.remove_all_outputs_tags=hide_output --output-dir . --output README --NbConvertApp.output_files_dir=nbs/images nbs/index.ipynb
	@sed -E 's#\]\(((tutorials|howto|explanations|experiments)/[^)]*|[0-9a-z_.]+\.ipynb[^)]*)\)#](nbs/\1)#g' README.md > .part && mv .part README.md

# Quarto says what it could not resolve and ends well all the same.
docs: $(READY)
	@command -v quarto > /dev/null || { echo "The site is built by Quarto, which is not here: get it from https://quarto.org/docs/get-started, then run make docs again."; exit 1; }
	PATH="$(BIN):$$PATH" $(BIN)/nbdev_docs > .docs.log 2>&1 || { cat .docs.log; exit 1; }
	@cat .docs.log; ! grep -i "Unable to resolve" .docs.log

record: $(READY)
	bash nbs/records/record.sh

transfer: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/records/study.py transfer demo/transfer

compare: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/records/study.py compare demo/compare

grid: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/records/study.py grid demo/grid

# DATA holds the folders realdata and realpool, which are not ours to give.
DATA ?= ../shared
recipes: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/records/recipes.py $(DATA) demo/recipes

evidence: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/records/evidence.py $(DATA) demo/evidence

bench: $(READY)
	SEQTRANSFER_BENCH_RECORD=$(RECORD) $(BIN)/python -m pytest tests/bench_affinity.py tests/bench_training.py tests/bench_grid.py -q -s

lab: $(READY)
	$(BIN)/jupyter lab nbs

clean:
	rm -rf demo
