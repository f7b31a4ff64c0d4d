# What a change needs, in the order in which it needs it. `make` lists them.
.PHONY: help setup check quick test docs

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

setup: ## everything to work with, into .venv
	pip install uv && uv sync --locked

check: ## format, lint and types, in seconds
	uv run ruff format .
	uv run ruff check .
	uv run pyright

quick: ## the tests of what needs no cluster, in about two minutes
	uv run pytest tests/test_project.py tests/test_cli.py tests/test_mistakes.py tests/datasets tests/serve/test_protocols.py

test: ## all tests, as CI runs them
	uv run pytest

docs: ## the documents on http://127.0.0.1:8001, rebuilt as they change
	uv run mkdocs serve --dev-addr 127.0.0.1:8001
