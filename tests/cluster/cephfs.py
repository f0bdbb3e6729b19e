"""CephFS: one monitor, two OSDs that keep two copies, one metadata server; mounted by ceph-fuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.cluster.nodes import Cluster, Fault
from tests.cluster.spaces import Space, space

FAULTS = ("OSD", "MDS")
_ADDRESS = "10.77.0.4"
_FSID = "7f3b2c1e-0000-4000-8000-000000000001"
_CONF = """[global]
fsid = {fsid}
mon host = v1:{address}:6789
mon initial members = a
public addr = {address}
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 2
osd pool default min size = 1
osd crush chooseleaf type = 0
osd heartbeat grace = 5
osd class update on start = false
mds beacon grace = 5
mds tick interval = 0.5
ms bind msgr2 = false
run dir = {folder}
pid file = {folder}/$type.$id.pid
admin socket = {folder}/$type.$id.$pid.asok
log file = {folder}/$type.$id.log
mon data = {folder}/mon
osd data = {folder}/osd$id
mds data = {folder}/mds
bluestore block size = 2147483648
mon osd full ratio = 0.99
mon osd nearfull ratio = 0.98
mon data avail crit = 1
mon warn on pool no redundancy = false
mon allow pool delete = true
"""


@contextmanager
def cluster() -> Iterator[Cluster]:
    with space(_ADDRESS, ("/var/lib/ceph", "/var/log/ceph", "/etc/ceph")) as made:
        conf = f"{made.folder}/ceph.conf"
        Path(conf).write_text(_CONF.format(fsid=_FSID, address=_ADDRESS, folder=made.folder))
        _begin(made, conf)
        # A file of its own for each: a client that was unmounted holds on to its file a while, and
        # the next one would not start.
        pid_file = "{path}.$$.pid"
        mount = f"ceph-fuse -c {conf} --id admin --pid-file={pid_file} {{path}} > {{path}}.out 2>&1"
        nodes = [made.mounted(name, mount) for name in ("A", "B")]
        faults = {
            "OSD": _killed(made, "osd.0", f"ceph-osd -c {conf} -i 0"),
            "MDS": _killed(made, "mds.a", f"ceph-mds -c {conf} -i a"),
        }
        yield Cluster("cephfs", *nodes, faults)


def _begin(made: Space, conf: str) -> None:
    run, folder = made.server.run, made.folder
    run(f"mkdir -p {folder}/mon {folder}/osd0 {folder}/osd1 {folder}/mds")
    run(f"monmaptool --create --fsid {_FSID} --addv a '[v1:{_ADDRESS}:6789]' {folder}/map")
    run(f"ceph-mon -c {conf} --mkfs -i a --monmap {folder}/map && ceph-mon -c {conf} -i a")
    ceph = f"timeout 20 ceph -c {conf}"
    made.until(f"{ceph} status")
    for number in (0, 1):
        uuid = f"7f3b2c1e-0000-4000-8000-00000000001{number}"
        run(f"{ceph} osd new {uuid}")
        run(f"ceph-osd -c {conf} -i {number} --mkfs --osd-uuid {uuid}", timeout_s=60.0)
        # One that has not heard yet which cluster it belongs to gives up.
        made.until(f"ceph-osd -c {conf} -i {number}")
    for what in ("osd pool create meta 8", "osd pool create data 8", "fs new kv meta data"):
        run(f"{ceph} {what}", timeout_s=60.0)
    run(f"ceph-mds -c {conf} -i a")
    made.until(f"{ceph} fs status kv | grep -q active || {ceph} mds stat | grep -q up:active", 60)


def _killed(made: Space, name: str, start: str) -> Fault:
    kill = f"kill -9 $(cat {made.folder}/{name}.pid)"
    return Fault(partial(made.server.run, kill), partial(made.until, start))
