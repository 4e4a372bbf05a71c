# One profile and one feature selection for everything (release, the whole workspace), so that
# RocksDB, 15 minutes on two cores, compiles once on a machine. The build directory lives outside
# of the checkout, so that a fresh clone does not compile it again.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/vasto/target
# Where the tests of the bucket find the S3 servers that scripts/setup.sh installs.
export VASTO_TEST_WEED ?= $(HOME)/.cache/vasto/venv/bin/weed
export VASTO_TEST_MOTO ?= $(HOME)/.cache/vasto/venv/bin/moto_server
# Which cells of the matrix of faults `make test` takes: those of another seed are others, and
# `make soak` takes all.
export VASTO_MATRIX_SEED ?= 1

built := $(abspath $(CARGO_TARGET_DIR))/release
selection := --release --workspace --locked

.PHONY: help setup build demo test soak check hooks bench

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing on this machine
	@scripts/setup.sh all

build: ## build everything; leaves bin/vasto
	@scripts/setup.sh build
	@scripts/take-turn.sh
	cargo build $(selection)
	@mkdir -p bin && ln -sfn $(built)/vasto bin/vasto

demo: ## a cluster loads real data and grows under load, from nothing, in one command
	@scripts/setup.sh demo
	@$(MAKE) --no-print-directory build
	$(built)/vasto-demo

test: ## the whole test suite
	@scripts/setup.sh test
	@scripts/take-turn.sh
	cargo nextest run $(selection)
	cargo test --doc $(selection)

soak: ## the same storms, histories, outages and resizes for hours instead of minutes
	@scripts/setup.sh test
	@scripts/take-turn.sh
	VASTO_LINEAR_SECONDS=240 VASTO_STORM_KILLS=200 VASTO_BUCKET_KILLS=150 VASTO_RESIZES=300 VASTO_GROWS=21 VASTO_FULL_WRITES=100 VASTO_MOMENTS=100 VASTO_TEST_OUTAGE=24x48 \
	VASTO_TEST_KEYSPACES=300 VASTO_TEST_THOUSAND=1000 VASTO_MODEL=full VASTO_MATRIX=all VASTO_STANDSTILL=60 VASTO_ESTIMATED_ROWS=400000 \
	cargo nextest run $(selection) --no-fail-fast --config-file .config/soak.toml \
	    -E 'package(vasto-tests) & test(/^(linearizable|storm|bucket_kills|full_writes|grows|undone|resizes|outage|many_replicas|matrix|thousand|estimates)::/) |
	        binary(lease_model) | test(moments)'

check: ## formatting, lints, and the licences and sources of dependencies
	@scripts/setup.sh check
	@scripts/take-turn.sh
	cargo fmt --all --check
	cargo clippy $(selection) --all-targets -- -D warnings
	cargo fetch --locked --quiet
	cargo deny --locked --offline check --hide-inclusion-graph bans licenses sources

hooks: ## have git check formatting and lints before each commit (git config core.hooksPath scripts/hooks)
	git config core.hooksPath scripts/hooks

bench: ## throughput and latency, beside embedded RocksDB
	@scripts/setup.sh bench
	@$(MAKE) --no-print-directory build
	scripts/bench.sh $(BENCH_FLAGS)
