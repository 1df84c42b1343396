#!/usr/bin/env bash
# One node of a run on several: call it on each of them, in the same folder and with the same words, and again on one
# that was lost.
#   bash launch/node.sh NODES PROCESSES FIRST CONFIG [key.sub=value…]
# NODES       how many nodes
# PROCESSES   on each of them, or gpu: as many as it has GPUs
# FIRST       name or address of the node where all meet, and HOST:PORT where port 29400 is taken there
# CONFIG      a YAML file; its run folder must be on a file system that all nodes see
# A run folder that holds a checkpoint is gone on with. What may be set in the environment:
#   ADDRESS             this node's own address; else the one from which it reaches FIRST
#   GLOO_SOCKET_IFNAME  the network interface for the stages' messages, and NCCL_SOCKET_IFNAME; else that of ADDRESS
#   RESTARTS            how often this node's processes are started again (3)
#   PYTHON              the interpreter that has blpipe (python3)
# Exit codes: 0 done, 1 failed while running, 2 wrong usage.
set -euo pipefail
python="${PYTHON:-python3}"

refuse() {
    echo "node.sh: $1" >&2
    exit 2
}

[ $# -ge 4 ] || refuse "give NODES PROCESSES FIRST CONFIG, such as 2 8 node1 configs/resnet32_cifar10_k16.yaml"
nodes="$1" processes="$2" first="$3" config="$4"
shift 4
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || refuse "NODES: $nodes: must be a number from 1 on"
[[ "$processes" =~ ^([1-9][0-9]*|gpu)$ ]] || refuse "PROCESSES: $processes: must be a number from 1 on, or gpu"
[[ "$first" =~ ^[A-Za-z0-9.-]+(:[0-9]+)?$ ]] || refuse "FIRST: $first: must be HOST or HOST:PORT"
[ -f "$config" ] || refuse "CONFIG: $config: no such file here"
[[ "$first" == *:* ]] || first="$first:29400"

# Nothing is sent: a datagram socket that is connected knows which address it would send from, and to which.
route=$("$python" -c '
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as s:
    s.connect((sys.argv[1], 9))
    print(s.getsockname()[0], s.getpeername()[0])' "${first%:*}" 2>/dev/null) ||
    refuse "FIRST: ${first%:*}: no such host, or no route to it"
read -r own meeting <<<"$route"
own="${ADDRESS:-$own}"
if [ "$nodes" -gt 1 ] && [[ -z "${ADDRESS:-}" && "$own" == 127.* ]]; then
    refuse "FIRST: ${first%:*} is $meeting here, which no other node can reach; give its address on the network"
fi
hosts=0
[ "$own" != "$meeting" ] || hosts=1

interface=$(ip -o -4 address show to "$own" 2>/dev/null | awk '{print $2; exit}') || true
if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"  # seconds to save after SIGTERM

# A node that is silent for 2 s × 5 is lost (clocks must agree to less than that). The others wait 30 minutes for it
# to come back, and 5 for FIRST to come up.
exec "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes" \
    --max-restarts="${RESTARTS:-3}" --local-addr="$own" --rdzv-backend=blpipe --rdzv-endpoint="$meeting:${first##*:}" \
    --rdzv-id=blpipe \
    --rdzv-conf="is_host=$hosts,keep_alive_interval=2,keep_alive_max_attempt=5,join_timeout=1800,read_timeout=300" \
    -m blpipe train "$config" --auto-resume "$@"
