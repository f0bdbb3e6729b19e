#!/bin/sh
# The first process of user-mode-linux (nfs.py): an NFS server and two clients of it, each with a network and a host
# name of its own, because two NFSv4 clients of one name take each other's lease. The root is the host's own files.
# Needs PYTHON, CHECKOUT and CACHE in its environment; serves agent.py on /dev/tty1 (node A), tty2 (B) and tty3 (server).
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 TMPDIR=/run/tmp HOME=/run/tmp

mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
for place in /run /mnt /dev/shm /var/lib/nfs; do mount -t tmpfs tmpfs "$place"; done
mount -t devpts devpts /dev/pts
mkdir -p /run/tmp /run/rpcbind /var/lib/nfs/sm /var/lib/nfs/sm.bak /var/lib/nfs/v4recovery /mnt/export /mnt/A /mnt/B
touch /var/lib/nfs/etab /var/lib/nfs/rmtab /var/lib/nfs/state

modprobe -d "$CACHE/um" -a sunrpc nfsd nfs nfsv3 nfsv4 veth
mount -t nfsd nfsd /proc/fs/nfsd
mount -t ext4 /dev/ubda /mnt/export
# NFS-ganesha (nfs.py starts it) serves a directory of that disk: it names files by handles, which hostfs has not.
mkdir /mnt/export/ganesha /run/ganesha /var/lib/nfs/ganesha

ip link set lo up
net=1
for node in A B; do
    ip netns add "$node"
    ip link add "v$node" type veth peer name "e$node"
    ip link set "e$node" netns "$node"
    ip addr add "10.77.$net.1/24" dev "v$node"
    ip link set "v$node" up
    ip -n "$node" addr add "10.77.$net.2/24" dev "e$node"
    ip -n "$node" link set "e$node" up
    ip -n "$node" link set lo up
    net=$((net + 1))
done

# After a restart the server takes nothing new before its clients have had this time to come back.
echo 10 > /proc/fs/nfsd/nfsv4leasetime
echo 10 > /proc/fs/nfsd/nfsv4gracetime
exportfs -o rw,sync,no_subtree_check,no_root_squash,fsid=0 '*:/mnt/export'
rpcbind
rpc.mountd
rpc.nfsd 8

cd "$CHECKOUT"
for tty in 1 2 3; do stty -F "/dev/tty$tty" raw -echo; done
net=1
for node in A B; do
    nsenter "--net=/run/netns/$node" unshare --uts \
        sh -c "hostname node-$node; exec setsid \"$PYTHON\" -m tests.cluster.agent" \
        < "/dev/tty$net" > "/dev/tty$net" 2> "$CACHE/log-$node" &
    net=$((net + 1))
done
"$PYTHON" -m tests.cluster.agent < /dev/tty3 > /dev/tty3 2> "$CACHE/log-server" || true
halt -f
