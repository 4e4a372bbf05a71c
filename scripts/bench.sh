#!/usr/bin/env bash
# Throughput and latency of one master and one node on this machine, beside RocksDB embedded in one
# process that does the same operations with the same number of clients, in the same run.
#
#   scripts/bench.sh               one table, in about three minutes
#   scripts/bench.sh --profile     and a CPU profile of the node, when `perf` is there and permitted
#
# SECONDS_EACH (5), KEYS (1000000), CLIENTS ("16 256") and ACKS ("os fsync") change what is run.
# All servers listen on free ports of 127.0.0.1; their data is in a temporary directory.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=no
case "${1:-}" in
    "") ;;
    --profile) profile=yes ;;
    *) printf 'usage: %s [--profile]\n' "$0" >&2; exit 2 ;;
esac

vasto="${VASTO_BIN:-$PWD/bin/vasto}"
seconds="${SECONDS_EACH:-5}"
keys="${KEYS:-1000000}"
read -r -a clients <<<"${CLIENTS:-16 256}"
read -r -a acks <<<"${ACKS:-os fsync}"
value_size=100

fail() { printf 'bench: error: %s\n' "$*" >&2; exit 1; }
say() { printf 'bench: %s\n' "$*" >&2; }

[ -x "$vasto" ] || fail "there is no $vasto; run \`make build\` first"
command -v jq >/dev/null || fail "jq is missing; install it (apt-get install jq)"

dir="$(mktemp -d "${TMPDIR:-/tmp}/vasto-bench.XXXXXX")"
pids=()
cleanup() {
    local pid
    # The node before the master that it reports to.
    for pid in $(printf '%s\n' "${pids[@]}" | tac); do
        kill -TERM "$pid" 2>/dev/null || continue
        # It promises to be gone within 10 s.
        timeout 12 tail --pid="$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Starts a server and waits for its line; leaves it in $ready.
start() {
    local name="$1"
    shift
    mkfifo "$dir/$name.ready"
    "$vasto" "$@" >"$dir/$name.ready" 2>"$dir/$name.log" &
    pids+=("$!")
    if ! read -r -t 30 ready <"$dir/$name.ready"; then
        cat "$dir/$name.log" >&2
        fail "the $name did not get ready"
    fi
}

start master serve master --bucket "file://$dir/bucket" --listen 127.0.0.1:0
master="$(jq -r .master <<<"$ready")"
start node serve node --master "$master" --dir "$dir/node"
node_pid="$(jq -r .pid <<<"$ready")"

bench() { "$vasto" bench "$@" --seconds "$seconds" --keys "$keys" --value-size "$value_size" --output json 2>>"$dir/bench.log"; }

# Samples of the node's threads, while the named workload runs against it.
profiled() {
    local name="$1"
    shift
    if [ "$profile" = no ]; then
        bench "$@"
        return
    fi
    perf record --quiet --freq 499 --pid "$node_pid" --output "$dir/perf.$name" \
        -- sleep "$seconds" >/dev/null 2>"$dir/perf.log" &
    local perf_pid="$!"
    bench "$@"
    if ! wait "$perf_pid"; then
        say "no profile: $(tail -1 "$dir/perf.log")"
        return
    fi
    mkdir -p target
    local out="target/profile-$name.txt"
    local sort
    # By thread, then by function.
    for sort in comm comm,dso,symbol; do
        perf report --stdio --percent-limit 0.5 --sort "$sort" --input "$dir/perf.$name" 2>/dev/null |
            sed -e '/^#.*\.\.\.\./d' -e '/^#$/d' -e 's/[ -]*$//'
    done >"$out"
    say "profile of the node: $out"
}

if [ "$profile" = yes ]; then
    if ! command -v perf >/dev/null; then
        say "no profile: perf is not installed"
        profile=no
    elif ! perf record --quiet --freq 99 --pid "$$" --output "$dir/perf.try" -- true >/dev/null 2>&1; then
        say "no profile: perf is not permitted here (see /proc/sys/kernel/perf_event_paranoid)"
        profile=no
    fi
fi

printf '%s on %s CPUs (%s), %s-byte values, %s keys, %s s each\n\n' \
    "$("$vasto" --version)" "$(nproc)" \
    "$(sed -n 's/^model name[^:]*: //p;T;q' /proc/cpuinfo)" "$value_size" "$keys" "$seconds"
row='%-8s %7s %-5s   %12s %10s %10s   %12s %10s %10s   %6s\n'
# shellcheck disable=SC2059
printf "$row" workload clients ack 'vasto/s' p50 p99 'embedded/s' p50 p99 ratio

for ack in "${acks[@]}"; do
    "$vasto" keyspace create "bench-$ack" --ack "$ack" --master "$master" >/dev/null
    for workload in put get; do
        for count in "${clients[@]}"; do
            common=(--workload "$workload" --clients "$count")
            ours="$(profiled "$workload-$count-$ack" "bench-$ack" --keep --master "$master" "${common[@]}")" \
                || fail "$workload: $(tail -2 "$dir/bench.log")"
            theirs="$(bench --embedded "$dir/embedded-$ack" --ack "$ack" "${common[@]}")" \
                || fail "$workload, embedded: $(tail -2 "$dir/bench.log")"
            # shellcheck disable=SC2046
            # shellcheck disable=SC2059
            printf "$row" "$workload" "$count" "$ack" $(jq -rs '
                def us: if . < 1000 then "\(. * 10 | round / 10)us" else "\(. / 10 | round / 100)ms" end;
                def one: "\(.ops_per_sec | round) \(.latency_us.p50 | us) \(.latency_us.p99 | us)";
                "\(.[0] | one) \(.[1] | one) \(.[0].ops_per_sec / .[1].ops_per_sec * 1000 | round / 1000)"
            ' <<<"$ours $theirs")
            errors="$(jq -s 'map(.errors) | add' <<<"$ours $theirs")"
            [ "$errors" = 0 ] || fail "$errors operations failed: $(tail -2 "$dir/bench.log")"
        done
    done
done
printf '\nratio: operations of Vasto, over gRPC and with its binlog, to those of RocksDB with its own write-ahead log.\n'
