# A node's network and RDMA device, then the command. NODE, MTU, NETEM and the command's own
# environment were set in the lines before these.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export ADDR=10.77.0.$((NODE + 1)) PEER=10.77.0.$((2 - NODE)) OUT=/softroce
ulimit -l unlimited
ip link set lo up
device=$(ls /sys/class/net | grep -v '^lo$' | head -n 1)
if [ -z "$device" ]; then # no cable: one end of a virtual one, so that rxe has something to sit on
    device=v0
    ip link add v0 type veth peer name v1
    ip link set v1 mtu "$MTU" up
fi
ip address add "$ADDR/24" dev "$device"
ip link set "$device" mtu "$MTU" up
for _ in $(seq 50); do
    ip link show "$device" | grep -q LOWER_UP && break
    sleep 0.1
done
rdma link add rxe0 type rxe netdev "$device" || exit 97
# shellcheck disable=SC2086  # netem's arguments are words
[ -z "$NETEM" ] || tc qdisc add dev "$device" root netem $NETEM || exit 97
uname -r > "$OUT/kernel-$NODE"
rdma link show rxe0/1 > "$OUT/device-$NODE"
