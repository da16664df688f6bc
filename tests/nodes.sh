#!/bin/bash
# Make two hosts on this machine, each a network namespace of Linux with one end of a virtual cable,
# or remove them with all that runs on them. Needs root and iproute2:
#
#     bash tests/nodes.sh make try         # hosts try-a (10.77.0.1) and try-b (10.77.0.2)
#     ip netns exec try-a ping -c 1 10.77.0.2
#     bash tests/nodes.sh remove try
#
# On each host the cable's end is called net0. Nothing outside can be reached from them.
set -eu
name=${2:?name of the pair is missing}

make() {
    ip netns add "$name-a"
    ip netns add "$name-b"
    ip link add net0 netns "$name-a" type veth peer name net0 netns "$name-b"
    ip -n "$name-a" address add 10.77.0.1/24 dev net0
    ip -n "$name-b" address add 10.77.0.2/24 dev net0
    for host in "$name-a" "$name-b"; do
        ip -n "$host" link set lo up
        ip -n "$host" link set net0 up
    done
}

remove() {
    for host in "$name-a" "$name-b"; do
        if ip netns pids "$host" >/dev/null 2>&1; then
            ip netns pids "$host" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
            ip netns delete "$host"
        fi
    done
}

case $1 in
    make | remove) "$1" ;;
    *) echo "nodes.sh: $1: must be make or remove" >&2; exit 2 ;;
esac
