# What people and CI run. `make up` on a fresh machine installs everything first; a second call is instant.
# CONFIG=configs/<file>.yaml chooses what runs, SET="--set a.b=c" overrides a value, RUN_DIR moves everything `up` writes.
CONFIG ?= configs/local-cpu.yaml
SET ?=
RUN_DIR ?=
BENCH ?= gateway --quick --set models.0.model_source=embedded:random
PYTEST ?= tests/unit tests/local
PY := .venv/bin/python
OPTIONS := $(SET) $(if $(RUN_DIR),--run-dir $(RUN_DIR))

.PHONY: up down status plan eval test test-cluster test-train unit check bench setup clean

up: setup          ## start the cluster and print the endpoint
	@$(PY) -m cluster up $(CONFIG) $(OPTIONS)

down: setup        ## stop it and leave nothing behind
	@$(PY) -m cluster down $(CONFIG) $(OPTIONS)

status: setup      ## what runs, and whether it answers
	@$(PY) -m cluster status $(CONFIG) $(OPTIONS)

plan: setup        ## what would run and what is wrong, without starting anything
	@$(PY) -m cluster check $(CONFIG) $(OPTIONS)

eval: setup        ## ask the running endpoint the held-out questions of the default model
	@$(PY) -m train eval

test: setup        ## every test that needs no GPU: real Ray, real vLLM; in two lanes (tests/conftest.py)
	$(PY) -m pytest $(PYTEST) -m "not training" -n 2 --dist loadgroup

test-cluster: setup  ## `ray up` on test hosts (network namespaces; root): autoscaling, updates, an attacker, `ray down`
	$(PY) -m pytest tests/cluster -s -m "not slow"

test-train: setup  ## long tests of training: faults, compression, a journey to a served adapter
	$(PY) -m pytest tests/local -m training

unit: setup        ## the tests that take seconds
	$(PY) -m pytest tests/unit

check: setup       ## style, types, import arrows
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict -p cluster -p serve_apps -p train -p bench
	$(PY) -m pytest -q tests/unit/test_tree.py

bench: setup       ## our endpoint beside bare vLLM on this machine
	$(PY) -m bench $(BENCH)

setup:             ## .venv and everything in it
	@./setup.sh

clean:             ## stop the cluster, then remove .venv, caches and the run directory
	@if [ -x $(PY) ]; then $(PY) -m cluster down $(CONFIG) $(OPTIONS); fi
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache $(or $(RUN_DIR),run)
