# Two commands do everything: make run, make test. Both install what they need into .venv.
PYTHON ?= python3
VENV = .venv
PY = $(VENV)/bin/python
# Absolute, because a notebook runs in its own folder. Recipes read it from the environment: it may hold spaces.
override STORE_DIR := $(or $(STORE_DIR),store)
override STORE_DIR := $(if $(filter ~ ~/%,$(firstword $(STORE_DIR))),$(subst ^~,$(HOME),^$(STORE_DIR)),$(STORE_DIR))
override STORE_DIR := $(if $(filter /%,$(firstword $(STORE_DIR))),$(STORE_DIR),$(CURDIR)/$(STORE_DIR))
export STORE_DIR
VERIFY = experiments/verify_sae_training
CEPTION = experiments/sae_ception
# Executed pages that ask nothing of any host: no MathJax, RequireJS or widget code from elsewhere.
RENDER = $(PY) -m nbconvert --log-level=ERROR --to html --execute \
  $(foreach script,require_js mathjax widget_renderer,--HTMLExporter.$(script)_url=data:,)
NOTEBOOKS = 03_analyze_training 04_name_sae_concepts 05_show_concepts
# Constants given to make, as in `make run MODEL=gpt2 TOP_K=16`, go to the steps that have them.
constants = $(sort $(shell grep -ohE '^[A-Z][A-Z0-9_]+' $(1)))
given = $(foreach name,$(call constants,$(1)),$(if $(findstring command line,$(origin $(name))),'$(name)=$(subst ','\'',$($(name)))'))
GIVEN = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
unknown = $(filter-out $(call constants,$(1)) STORE_DIR PYTHON VENV PY,$(GIVEN))
check = $(if $(call unknown,$(1)),$(error there is no constant $(call unknown,$(1)); see --help of $(1)))

.PHONY: run check faults coverage test ception pictures peers serving bench clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps overcomplete==0.3.0
	touch $@

# Saves activations, trains an SAE, executes the notebooks into HTML pages, prints the verification.
STEPS = $(VERIFY)/00_probe_layers.py $(VERIFY)/01_save_activations.py $(VERIFY)/02_train_sae.py
run: $(VENV)/installed
	$(call check,$(STEPS))$(PY) $(word 1,$(STEPS)) $(call given,$(word 1,$(STEPS)))
	$(PY) $(word 2,$(STEPS)) $(call given,$(word 2,$(STEPS)))
	$(PY) $(word 3,$(STEPS)) $(call given,$(word 3,$(STEPS)))
	for name in $(NOTEBOOKS); do \
	  $(RENDER) --output-dir "$$STORE_DIR/verify_sae_training/pages" $(VERIFY)/$$name.ipynb || exit 1; \
	done
	@$(PY) $(VERIFY)/show_verification.py
	@echo "pages: $$STORE_DIR/verify_sae_training/pages/*.html and $$STORE_DIR/verify_sae_training/concepts.html"

# The second experiment on the embedded default, with its notebooks.
ception: $(VENV)/installed
	$(call check,$(CEPTION)/04_train_cycle.py)$(PY) $(CEPTION)/04_train_cycle.py $(call given,$(CEPTION)/04_train_cycle.py)
	for name in 05_compare_cycles 06_interpret_features; do \
	  $(RENDER) --output-dir "$$STORE_DIR/sae_ception/pages" $(CEPTION)/$$name.ipynb || exit 1; \
	done
	@echo "pages: $$STORE_DIR/sae_ception/pages/*.html"

# The pictures of the README, from the figures that `make run` leaves; PAGE: the latent whose page is pictured, by a browser.
PAGE ?= 514
pictures:
	mkdir -p $(VERIFY)/pictures
	for name in verification training_curves concept_recovery concept_examples baselines; do cp "$$STORE_DIR/verify_sae_training/figures/$$name.png" $(VERIFY)/pictures/; done
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,820 --screenshot=$(VERIFY)/pictures/concept_page.png \
	  "file://$$STORE_DIR/verify_sae_training/concepts.html#$(PAGE)"

# The other libraries, in an environment of their own, for the benchmarks and the tests of exported files.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0 transformers==5.23.0 "numpy<2.5" datasets==5.2.0 safetensors
	.venv-peers/bin/python -m pip install -q sae-lens==6.54.12 eai-sparsify==1.3.3 scikit-learn==1.9.1 matplotlib==3.10.9 nnsight==0.8.1 torch==2.13.0
	.venv-peers/bin/python -m pip install -q --no-deps overcomplete==0.3.0 dictionary-learning==0.1.0 sae-bench==0.6.0 tabulate==0.9.0
	touch $@
peers: .venv-peers/installed

# What `transformers serve` needs beside the project: a chat model of your own for naming, and one test.
.venv-serve/installed: $(VENV)/installed
	$(PY) -m pip install -q --target .venv-serve fastapi==0.165.0 uvicorn==0.54.0 openai==3.52.0 rich==15.0.0
	touch $@
serving: .venv-serve/installed

# Some hours on two cores: ours and the peers in turns. What 03 has of the peers is kept when it is started again.
bench: $(VENV)/installed .venv-peers/installed
	$(PY) experiments/benchmarks/01_time_activations.py
	$(PY) experiments/benchmarks/02_time_sae_training.py
	for preset in small wide synth_sae_bench; do $(PY) experiments/benchmarks/03_recover_known_features.py PRESET=$$preset || exit 1; done
	$(PY) -m nbconvert --log-level=ERROR --to html --execute --output-dir "$$STORE_DIR/benchmarks" experiments/benchmarks/04_show_benchmarks.ipynb

# Style and types: ruff and mypy, settings in pyproject.toml.
check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	for folder in experiments/*/; do MYPYPATH=$$folder $(VENV)/bin/mypy $$folder || exit 1; done

# Each long script killed 24 times, 24 bytes flipped in each kind of file ..., and a table of it; a quarter of an hour.
faults: $(VENV)/installed
	FAULTS=24 $(PY) -m pytest -q tests/test_faults_*.py

# Which lines of lib the tests run.
coverage: $(VENV)/installed
	$(PY) -m pytest -q --cov=lib --cov-report=term-missing:skip-covered tests

# Two workers, each with one thread and whole files, so that what a file prepares is prepared once.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

clean:
	rm -rf $(VENV) .venv-peers .venv-serve
