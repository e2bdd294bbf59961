#!/bin/busybox sh
# First process of a node. Mounts the host's files read-only below a RAM overlay, runs node.sh there,
# leaves its exit status in the folder that the host reads, and powers off.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do
    insmod "/modules/$module" || echo "softroce: insmod $module failed"
done
mkdir -p /lower /ram /root9
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /lower
mount -t tmpfs tmpfs /ram
mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/lower,upperdir=/ram/upper,workdir=/ram/work overlay /root9
for folder in proc sys dev run tmp softroce; do mkdir -p "/root9/$folder"; done
mount -t proc proc /root9/proc
mount -t sysfs sysfs /root9/sys
mount -t devtmpfs dev /root9/dev
mkdir -p /root9/dev/shm
mount -t tmpfs tmpfs /root9/dev/shm
mount -t tmpfs tmpfs /root9/run
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576 out /root9/softroce
# from the kernel's command line: softroce.node, softroce.nodes
for word in $(cat /proc/cmdline); do
    case $word in softroce.*) eval "${word#softroce.}" ;; esac
done
chroot /root9 /bin/bash "/softroce/node-$node.sh"
echo $? > "/root9/softroce/exit-$node"
# A node that is done stays for the other one, which may still wait for an answer on the wire.
[ "$nodes" = 1 ] || while [ ! -s "/root9/softroce/exit-$((1 - node))" ]; do sleep 0.2; done
poweroff -f
