# `make test` is all that a change has to pass, here and in .ci/run.
# Every stage prints what it runs and how long it took; the first failure ends the run.

SHELL := /bin/sh
VENV := target/venv
STAGE := tests/stage
export CARGO_TERM_COLOR ?= never
export CARGO_INCREMENTAL ?= 1
export TEST_PYTHON := $(CURDIR)/$(VENV)/bin/python
NEXTEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: test nightly deps fmt clippy build unit doc venv check clean-test help

help:
	@echo "make test    everything that a change has to pass"
	@echo "make nightly the long ones: a night on two cores; T=<filter> picks some"
	@echo "make deps    only what the tests need on this machine (apt on Debian, as root)"
	@echo "make check   format, lints"
	@echo "make unit    the tests alone; T=<filter> picks some"

test: deps venv fmt clippy build unit doc
	@printf '\n=== make test: everything passed\n'

check: fmt clippy

deps:
	@$(STAGE) deps tests/deps

venv: $(VENV)/.installed

$(VENV)/.installed: tests/py/requirements.txt | deps
	@$(STAGE) venv sh -c 'python3 -m venv $(VENV) && $(VENV)/bin/pip install -q --disable-pip-version-check -r tests/py/requirements.txt'
	@touch $@

fmt:
	@$(STAGE) fmt cargo fmt --all --check

clippy:
	@$(STAGE) clippy cargo clippy --workspace --all-targets --locked -- -D warnings

# The tests start the binaries of the same profile; cargo builds no binary for another package's tests.
# Together with the tests, because the features of dependencies, hence what is compiled, are then the same.
build:
	@$(STAGE) build cargo build --workspace --bins --tests --locked

# Unit, property, simulation, tidy and integration tests.
ifeq ($(NEXTEST),yes)
unit: venv build
	@$(STAGE) tests cargo nextest run --workspace --locked --no-fail-fast $(T)
else
unit: venv build
	@$(STAGE) tests cargo test --workspace --locked --no-fail-fast --lib --bins --tests -- --test-threads=2 $(T)
endif

# Tests named nightly_..., ignored elsewhere: `#[ignore = "nightly: why it takes long"]`.
ifeq ($(NEXTEST),yes)
nightly: venv build
	@$(STAGE) nightly cargo nextest run --workspace --locked --no-fail-fast --run-ignored only -E 'test(nightly_)' $(T)
else
nightly: venv build
	@$(STAGE) nightly cargo test --workspace --locked --no-fail-fast --lib --bins --tests -- --ignored --test-threads=1 nightly_ $(T)
endif

doc:
	@$(STAGE) doc-tests cargo test --workspace --locked --doc -q
	@$(STAGE) docs env RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --workspace --no-deps --document-private-items --locked -q
