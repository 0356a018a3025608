#!/usr/bin/env bash
# Format, clippy with warnings as errors, tests, docs.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --check
cargo clippy --all-targets --quiet -- -D warnings
cargo test --quiet
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
