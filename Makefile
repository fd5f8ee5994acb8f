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
test: test-programs ## every test but those of `make examples` and `make e2e`, on a real control plane and real systemd nodes (as root)
	@hack/test.sh

.PHONY: examples
examples: test-programs ## every example and every block of the cookbook, deployed (as root; needs package registries)
	cargo test --workspace --locked --test examples

.PHONY: coverage
coverage: prerequisites ## which lines of the planners the unit tests reach, and which they do not
	hack/coverage.sh

.PHONY: check
check: check-rust check-dependencies check-scripts check-generated check-chart ## formatting, lints, licences, generated files, the chart; what CI runs before the tests

# The tests that run Kari, with its parts in Pods: as many as `make e2e` has time for, and the others.
# CONTRIBUTING.md says which cannot run so.
tests_in_pods = deploy failure references routes
more_tests_in_pods = crash git_servers many nodes probes removal rollout secrets switch

.PHONY: check-long
check-long: build ## what is too long for `make test`, or needs a package registry: more tests in Pods, third-party servers, two versions together, 20 testbeds in a row, the image twice
	KARI_TESTBED_KUBELET=1 cargo test --workspace --locked --no-fail-fast $(addprefix --test ,$(more_tests_in_pods))
	hack/third-party.sh
	hack/skew.sh
	hack/up-down.sh
	hack/image-twice.sh

.PHONY: e2e
e2e: test-programs ## Kari as a cluster has it: image, nodes with a kubelet, helm install, upgrade, rollback, uninstall (as root)
	cargo test --workspace --locked --test kubelet
	cargo test --workspace --locked --test e2e -- --nocapture
	KARI_TESTBED_KUBELET=1 cargo test --workspace --locked $(addprefix --test ,$(tests_in_pods))

.PHONY: image
image: prerequisites ## Kari's image as target/kari-image.tar, without a registry; the Dockerfile makes the same with one
	mkdir -p target
	hack/image.sh target/kari-image.tar

.PHONY: build
build: prerequisites ## the programs and the testbed, for development
	cargo build --workspace --locked

# With the features that the tests' own dependencies turn on: after `cargo build` most libraries would be built again.
.PHONY: test-programs
test-programs: prerequisites
	cargo test --workspace --locked --no-run

.PHONY: generate
generate: prerequisites ## write crds/, docs/api.md and the chart's copies and page anew
	KARI_WRITE_GENERATED=1 cargo test --workspace --quiet --locked --test generated

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
