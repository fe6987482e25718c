# Two commands do everything: make run, make test. Both install what they need into .venv.
PYTHON ?= python3
VENV = .venv
PY = $(VENV)/bin/python
# Absolute, because a notebook runs in its own folder.
export STORE_DIR := $(abspath $(or $(STORE_DIR),store))
VERIFY = experiments/verify_sae_training
NOTEBOOKS = 03_analyze_training 04_name_sae_concepts 05_show_concepts

.PHONY: run test clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

# Saves activations, trains an SAE, executes the notebooks into HTML pages, prints the verification.
run: $(VENV)/installed
	$(PY) $(VERIFY)/01_save_activations.py
	$(PY) $(VERIFY)/02_train_sae.py
	for name in $(NOTEBOOKS); do \
	  $(VENV)/bin/jupyter nbconvert --log-level=ERROR --to html --execute --output-dir $(STORE_DIR)/verify_sae_training/pages $(VERIFY)/$$name.ipynb || exit 1; \
	done
	@$(PY) -m lib.verification
	@echo "pages: $(STORE_DIR)/verify_sae_training/pages/*.html and $(STORE_DIR)/verify_sae_training/concepts.html"

test: $(VENV)/installed
	$(PY) -m pytest -q tests

clean:
	rm -rf $(VENV)
