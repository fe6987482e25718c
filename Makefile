# make run shows what the project does, make test that it works, make house how it is built.
# Whatever a target needs is installed first, into .venv.
PYTHON ?= python3
VENV = .venv
PY = $(VENV)/bin/python
# Lower case, because constants are upper case: VERIFY is one of step 2.
verify = experiments/verify_sae_training
ception_steps = experiments/sae_ception
benchmarks = experiments/benchmarks

# Where outputs go. Absolute, because a notebook runs in its own folder; recipes read it from the environment, because
# it may hold spaces.
override STORE_DIR := $(or $(STORE_DIR),store)
override STORE_DIR := $(if $(filter ~ ~/%,$(firstword $(STORE_DIR))),$(subst ^~,$(HOME),^$(STORE_DIR)),$(STORE_DIR))
override STORE_DIR := $(if $(filter /%,$(firstword $(STORE_DIR))),$(STORE_DIR),$(CURDIR)/$(STORE_DIR))
export STORE_DIR

# Constants given to make, as in `make run MODEL=gpt2 TOP_K=16`, go to the experiment's run_steps.py, which checks them
# and hands each to the steps that have it.
GIVEN = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
constants = $(foreach name,$(filter-out STORE_DIR PYTHON VENV PY,$(GIVEN)),'$(name)=$(subst ','\'',$($(name)))')

.PHONY: run explore ception pictures test check house coverage faults peers serving bench gpu clean

# overcomplete asks for packages that work on images, a quarter of a gigabyte; its sparse autoencoders don't use them.
$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps overcomplete==0.3.0
	touch $@

# The first experiment: save activations, train an SAE, verify that it learnt, name its concepts; ends in a page.
run: $(VENV)/installed
	$(PY) $(verify)/run_steps.py $(constants)

# The concepts page with the model behind it, on 127.0.0.1: type a text, steer, take a latent away.
explore_page = $(verify)/10_explore.py
explore: $(VENV)/installed
	$(PY) $(explore_page) $(constants)

# The second experiment: feed sharpened concepts back into training, cycle by cycle, and compare the arms.
ception: $(VENV)/installed
	$(PY) $(ception_steps)/run_steps.py $(constants)

# The README's pictures, readable at 400 pixels: figures that make run leaves, and the page and its latent PAGE in a
# narrow browser window.
sae_folder = $$STORE_DIR/verify_sae_training/saes/$$(cat "$$STORE_DIR/verify_sae_training/last_sae.txt")
PAGE ?= 819
pictures:
	mkdir -p $(verify)/pictures
	for name in concept_recovery baselines; do \
	  cp "$(sae_folder)/figures/$$name.png" $(verify)/pictures/ || exit 1; \
	done
	for name in concepts_list concept_page; do \
	  case $$name in concept_page) at="#$(PAGE)";; *) at=;; esac; \
	  chromium --headless --no-sandbox --hide-scrollbars --window-size=460,760 --force-device-scale-factor=2 \
	    --screenshot=$(verify)/pictures/$$name.png "file://$(sae_folder)/concepts.html$$at" || exit 1; \
	done

# All tests. Two workers, each with one thread and whole files, so that what a file prepares is prepared once.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

# Style and types, by ruff and mypy; their settings are in pyproject.toml.
check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	for folder in experiments/*/; do MYPYPATH=$$folder $(VENV)/bin/mypy $$folder || exit 1; done

# What stands where, what imports what, and what breaks the rules of the house.
house:
	@$(PYTHON) tests/house.py

# Which lines of lib no test runs.
coverage: $(VENV)/installed
	$(PY) -m pytest -q --cov=lib --cov-report=term-missing:skip-covered tests

# Faults in earnest, a quarter of an hour: each long script killed 24 times, 24 bytes flipped in each kind of file ...
faults: $(VENV)/installed
	FAULTS=24 $(PY) -m pytest -q tests/test_faults_*.py

# Other libraries, to compare with and to read exported files; an environment of their own, because they conflict.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0 transformers==5.23.0 "numpy<2.5" datasets==5.2.0 safetensors
	.venv-peers/bin/python -m pip install -q torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 scikit-learn==1.9.1 \
	  matplotlib==3.10.9 nnsight==0.8.1
	.venv-peers/bin/python -m pip install -q --no-deps overcomplete==0.3.0 dictionary-learning==0.1.0 sae-bench==0.6.0 \
	  tabulate==0.9.0
	touch $@
peers: .venv-peers/installed

# What `transformers serve` needs besides: a chat model of your own names the concepts.
.venv-serve/installed: $(VENV)/installed
	$(PY) -m pip install -q --target .venv-serve fastapi==0.165.0 uvicorn==0.54.0 rich==15.0.0
	touch $@
serving: .venv-serve/installed

# The benchmarks' tables: ours and the peers in turns, some hours on two cores. Finished rounds of 03 are kept.
bench: $(VENV)/installed .venv-peers/installed
	$(PY) $(benchmarks)/run_steps.py $(constants)

# Everything that needs a GPU, in ten minutes at most: the tests marked gpu, then the timings, beside the peers' where
# `make peers` has been run. Where there is no GPU it says so.
gpu: $(VENV)/installed
	$(PY) $(benchmarks)/08_run_on_gpu.py $(constants)

# Everything installed; the store stays.
clean:
	rm -rf $(VENV) .venv-peers .venv-serve
