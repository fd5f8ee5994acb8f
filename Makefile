# `make help` lists the targets: those with a comment after ##.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The project's own scripts, wherever they are: tracked, and shell by their first line.
shell_files = $(shell git grep -lIE '^\#!/(bin|usr/bin/env) ?(bash|sh|/bash|/sh)' -- ':!*.md')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: demo
demo: build ## a control plane and three nodes here, a deployment, a second commit; until Ctrl-C (HOLD=0: ends by itself)
	@hack/demo.sh

.PHONY: test
test: build ## every test but those of `make e2e`, on a real control plane and real systemd nodes (as root)
	@hack/test.sh

.PHONY: coverage
coverage: prerequisites ## which lines of the planners the unit tests reach, and which they do not
	hack/coverage.sh

.PHONY: check
check: check-rust check-dependencies check-scripts check-generated check-chart ## formatting, lints, licences, generated files, the chart; what CI runs before the tests

.PHONY: check-long
check-long: build ## what is too long for `make test`, or needs a package registry: third-party servers, two versions together, 20 testbeds in a row, the image twice
	hack/third-party.sh
	hack/skew.sh
	hack/up-down.sh
	hack/image-twice.sh

.PHONY: e2e
e2e: build ## Kari as a cluster has it: image, nodes with a kubelet, helm install, upgrade, uninstall (as root)
	cargo test --locked --test e2e -- --nocapture
	KARI_TESTBED_KUBELET=1 cargo test --locked --test deploy --test failure --test references --test routes

.PHONY: image
image: prerequisites ## Kari's image as target/kari-image.tar, without a registry; the Dockerfile makes the same with one
	mkdir -p target
	hack/image.sh target/kari-image.tar

.PHONY: build
build: prerequisites ## the programs and the testbed, for development
	cargo build --workspace --locked

.PHONY: generate
generate: prerequisites ## write crds/, docs/api.md and the chart's copies and page anew
	KARI_WRITE_GENERATED=1 cargo test --quiet --locked --test generated

.PHONY: clean
clean: ## remove what was built here; caches in the user's cache folder stay
	cargo clean

.PHONY: prerequisites
prerequisites: ## install what Debian or Ubuntu package, or say what is missing
	@hack/prerequisites.sh

.PHONY: check-rust
check-rust: prerequisites
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

.PHONY: check-dependencies
check-dependencies: prerequisites
	hack/cargo-deny.sh --locked check bans licenses sources

.PHONY: check-scripts
check-scripts: prerequisites
	shellcheck --external-sources $(shell_files)
	yamllint --strict $$(git ls-files '*.yaml' '*.yml' .yamllint)

.PHONY: check-chart
check-chart: prerequisites
	hack/chart.sh

.PHONY: check-generated
check-generated: generate
	@git diff --exit-code -- crds docs/api.md charts || \
	  { echo "Generated files are older than what they are made from: commit what \`make generate\` wrote." >&2; exit 1; }
