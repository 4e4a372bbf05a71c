#!/usr/bin/env bash
# Makes every source of this checkout new when another checkout has used the build directory since.
#
# Cargo names what it builds by paths relative to the workspace and compares times: with a build
# directory that two checkouts share it would take the other one's programs for this one's.
set -euo pipefail
cd "$(dirname "$0")/.."

build="${CARGO_TARGET_DIR:-target}"
mark="${build}/.checkout"
# A directory that was removed and cloned anew is another checkout.
here="$(pwd -P) $(stat --format='%i %W' .git 2>/dev/null || stat --format='%i %W' .)"
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$here" ]; then
    exit 0
fi
if [ -f "$mark" ]; then
    echo "build: another checkout used ${build} last; the workspace is compiled anew"
fi
find . -path ./target -prune -o -path ./.git -prune -o -type f -exec touch {} +
mkdir -p "$build"
printf '%s\n' "$here" > "$mark"
