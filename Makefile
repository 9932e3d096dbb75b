# make demo, make test and make lint work from a bare clone: each makes .venv and installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train a small DiNAT and a small flow on handwritten digits and draw what they learned"
	@echo "make test   run the tests"
	@echo "make lint   check style"
	@echo "make clean  remove .venv"

demo: .venv/.installed
	@$(BIN)/zoo demo

test: .venv/.installed-test
	@$(BIN)/python -m pytest -q -n 2

lint: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf .venv

# One stamp per set of extras; a stamp older than pyproject.toml installs again.
.venv/bin/python:
	@echo "creating .venv"
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "installing attn-zoo (PyTorch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/.installed-%: pyproject.toml | .venv/bin/python
	@echo "installing attn-zoo[$*] (PyTorch is large: the first time takes minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[$*]"
	@touch $@
