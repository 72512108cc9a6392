# Needs make, Python 3.11 or newer and pip 22.3 or newer. `make` lists what there is.
.PHONY: help demo setup test test-fast test-stack test-drills soak lint format pins

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## run the whole pipeline on five small photos, until Ctrl-C
	python3 -m venv --without-pip .venv && python3 -m pip --python .venv install --no-deps --require-hashes -r requirements.txt && python3 -m pip --python .venv install --no-deps -e . && .venv/bin/imagepipeline demo

setup: .venv/dev ## create .venv with everything a developer needs

test: ## run everything that CI runs
	python3 -m venv --without-pip .venv && python3 -m pip --python .venv install --no-deps --require-hashes -r requirements-dev.txt && python3 -m pip --python .venv install --no-deps -e . && .venv/bin/pytest

test-fast: .venv/dev ## run the fast tests: within a minute on two cores
	.venv/bin/pytest -m fast

test-stack: .venv/dev ## run the tests that start a stack or take long
	.venv/bin/pytest -m stack

test-drills: .venv/dev ## run the failure drills: processes killed, frozen and cut off
	.venv/bin/pytest -m drills

soak: .venv/dev ## run the soak: ten minutes of uploads and faults (docs/reliability.md)
	.venv/bin/python -m imagepipeline_tests.end_to_end.soak

lint: .venv/dev ## check style, format, types, import contracts and Dagster's definitions
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/dg check defs

format: .venv/dev ## format the code and fix what ruff can fix
	.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

pins: ## pin all dependencies again; UPGRADE="-P pillow" upgrades one, UPGRADE=-U all
	python3 -m venv --without-pip .venv-uv && python3 -m pip --quiet --python .venv-uv install uv==0.13.9
	.venv-uv/bin/uv pip compile $(UPGRADE) --quiet --universal --generate-hashes --no-header --no-annotate pyproject.toml -o requirements.txt
	.venv-uv/bin/uv pip compile $(UPGRADE) --quiet --universal --generate-hashes --no-header --no-annotate pyproject.toml --group dev -o requirements-dev.txt

.venv/dev: requirements-dev.txt pyproject.toml
	python3 -m venv --without-pip .venv
	python3 -m pip --quiet --python .venv install --no-deps --require-hashes -r requirements-dev.txt
	python3 -m pip --quiet --python .venv install --no-deps -e .
	touch $@
