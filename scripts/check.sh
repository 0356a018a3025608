#!/usr/bin/env bash
# Checks the format, the lints (clippy, with warnings as errors), the tests, the library's docs and
# the shell scripts.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/timing.sh
part "cargo fmt" cargo fmt --check
part "cargo clippy" cargo clippy --all-targets --quiet -- -D warnings
part "cargo test" cargo test --quiet
part "cargo doc" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
part shellcheck scripts/check_shell
