"""Keeps the pools as the sources of instances say: a file, and etcd."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from functools import partial

import aiohttp
from yarl import URL

from ucm.pd.fleet.etcd import Etcd, Registration
from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.fleet.file import Listed, read_instances
from ucm.pd.fleet.follow import changes, follow
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.pool import Pool
from ucm.pd.security.followed import follow as follow_file

logger = logging.getLogger(__name__)

_ETCD_RETRY_S = 1.0


class Members:
    """Owned by the event loop's thread. A source takes away only what it has brought."""

    def __init__(self, pools: Mapping[Role, Pool]) -> None:
        self._pools = pools
        self._listed: Listed = {}
        self._registered: Mapping[str, Registration] = {}

    def sources(
        self, session: aiohttp.ClientSession, *, instances_file: str | None, etcd: EtcdAccess | None
    ) -> list[Coroutine[None, None, None]]:
        """What follows each source, to be run until it is cancelled."""
        following: list[Coroutine[None, None, None]] = []
        if instances_file is not None:
            read = partial(read_instances, instances_file)
            following.append(follow_file([instances_file], read, self.listed, what="instances"))
        if etcd is not None:
            following.append(follow(Etcd(session, etcd), self.registered, retry_s=_ETCD_RETRY_S))
        return following

    def listed(self, now: Listed) -> None:
        """The file names these."""
        before, self._listed = self._listed, now
        for role in Role:
            old, new = before.get(role, ()), now.get(role, ())
            self._change(
                role,
                add=[url for url in new if url not in old],
                remove=[url for url in old if url not in new],
            )

    def registered(self, now: Mapping[str, Registration]) -> None:
        """etcd has these. One with a new incarnation was restarted: it begins anew here, too."""
        add, remove = changes(self._registered, now)
        self._registered = dict(now)
        for role in Role:
            self._change(
                role,
                add=[URL(each.url) for each in add if each.role == role.value],
                remove=[URL(each.url) for each in remove if each.role == role.value],
            )

    def _change(self, role: Role, *, add: list[URL], remove: list[URL]) -> None:
        pool = self._pools.get(role)
        if pool is None:
            if add:
                urls = ", ".join(map(str, add))
                logger.warning("%s instances are of no use in this mode: %s", role.value, urls)
            return
        for url in remove:
            if pool.remove(url):
                logger.info("%s %s has left", role.value, url)
        for url in add:
            if pool.add(url):
                logger.info("%s %s has come", role.value, url)
