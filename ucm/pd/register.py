"""Registers one instance in etcd for as long as it answers.

python -m ucm.pd.register --role prefill --url http://host:7800 --etcd-addr host:2379

Run it beside the instance. It looks at /health from outside, so it works with any engine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

try:
    import aiohttp
    from yarl import URL

    from ucm.errors import ConfigError
    from ucm.pd.access import bearer
    from ucm.pd.flags import OneLineParser, seconds_flag
    from ucm.pd.fleet.etcd import CALL_TIMEOUT_S, Etcd, Registration
    from ucm.pd.fleet.etcd_access import EtcdAccess, add_etcd_flags, etcd_access
    from ucm.pd.fleet.etcd_gateway import EtcdError
    from ucm.pd.fleet.instance import Role
    from ucm.pd.fleet.urls import instance_url
    from ucm.pd.legs.upstream import IDLE_CONNECTION_S
    from ucm.pd.security import tls
    from ucm.pd.security.credentials import InstanceFiles, add_instance_files, instance_files
    from ucm.pd.security.keys import Keys
except ModuleNotFoundError as error:
    raise SystemExit(f"registering needs {error.name}: pip install 'ucm[proxy]'") from None

logger = logging.getLogger("ucm.pd.register")

# Proxies wait 10 s for instances to come back after an outage of etcd: be there well before.
_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 2.0
# Less would take a busy etcd for one that is lost.
_SHORTEST_CALL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class RegisterSettings(InstanceFiles):
    role: Role
    url: URL
    etcd: EtcdAccess
    health_url: URL
    lease_ttl_s: int = 5
    interval_s: float = 1.0
    api_key_file: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Stay registered until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    settings = parse_flags(arguments)
    try:
        asyncio.run(_run(settings))
    except ConfigError as error:
        _parser().error(str(error))


def parse_flags(arguments: Sequence[str] | None) -> RegisterSettings:
    """Exits with status 2 and one line on stderr for flags that can't be meant."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        etcd = etcd_access(args)
        assert etcd is not None, "--etcd-addr is required"
        settings = RegisterSettings(
            role=Role(args.role),
            url=instance_url(args.url),
            etcd=etcd,
            health_url=_health_url(args.health_url, args.url),
            lease_ttl_s=args.lease_ttl_s,
            interval_s=args.interval_s,
            api_key_file=args.api_key_file,
            **vars(instance_files(args)),
        )
    except ConfigError as error:
        parser.error(str(error))
    if settings.interval_s >= settings.lease_ttl_s:
        parser.error("--interval-s must be shorter than --lease-ttl-s: the lease would run out")
    return settings


def call_timeout_s(settings: RegisterSettings) -> float:
    """For each endpoint: the lease outlives a renewal for which all but the last one are silent."""
    spare_s = (settings.lease_ttl_s - settings.interval_s) / len(settings.etcd.endpoints)
    return min(CALL_TIMEOUT_S, max(_SHORTEST_CALL_S, spare_s))


class Registrar:
    """Keeps one instance registered. Owned by the event loop's thread. Raises ConfigError when made
    for a file without keys.

    One task looks at the instance, the other one talks to etcd: a slow etcd must not hide a restart
    of the instance.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: RegisterSettings) -> None:
        self._session = session
        self._settings = settings
        self._tls = tls.of_instances(settings)
        self._keys = Keys((), settings.api_key_file, flag="--api-key-file")
        self._etcd = Etcd(session, settings.etcd, timeout_s=call_timeout_s(settings))
        # None while the instance does not answer.
        self._wanted: Registration | None = None
        self._failing_since_s = time.monotonic()
        self._lease: int | None = None
        self._written: Registration | None = None
        self._is_out = False

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; the instance is then registered no more."""
        doing = [self._look(), self._hold(), stop.wait()]
        doing += [*self._keys.following(), *self._tls.following()]
        tasks = [asyncio.create_task(each) for each in doing]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                await self._leave()
            except EtcdError as error:
                logger.warning("the lease is left to run out: %s", error)
        for task in done:
            task.result()

    # -- the instance ----------------------------------------------------------------------

    async def _look(self) -> None:
        """Each time that the instance begins to answer it may be a restarted one."""
        settings = self._settings
        while True:
            began_s = time.monotonic()
            if await self._answers():
                if self._wanted is None:
                    self._wanted = Registration(
                        settings.role.value, str(settings.url), uuid.uuid4().hex
                    )
                    logger.info("%s answers: %s", settings.health_url, self._wanted.incarnation)
            elif self._wanted is not None:
                self._wanted, self._failing_since_s = None, began_s
                logger.warning("%s does not answer", settings.health_url)
            await asyncio.sleep(settings.interval_s)

    async def _answers(self) -> bool:
        # An engine that is busy may be slow; it is taken for gone when a lease would be, too.
        timeout = aiohttp.ClientTimeout(total=self._settings.lease_ttl_s)
        looking = self._session.get(
            self._settings.health_url,
            timeout=timeout,
            headers=bearer(self._keys.first),
            ssl=self._tls.now,
        )
        try:
            async with looking as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    # -- etcd ------------------------------------------------------------------------------

    async def _hold(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            if await self._succeeds():
                retry_s = _FIRST_RETRY_S
                await asyncio.sleep(self._settings.interval_s)
            else:
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _succeeds(self) -> bool:
        """One beat. False after an EtcdError, of which the first is logged."""
        try:
            await self._beat()
        except EtcdError as error:
            if not self._is_out:
                logger.warning("trying again until etcd is back: %s", error)
            self._is_out = True
            return False
        if self._is_out:
            logger.info("etcd answers again")
        self._is_out = False
        return True

    async def _beat(self) -> None:
        """Raises EtcdError."""
        wanted, ttl_s = self._wanted, self._settings.lease_ttl_s
        if wanted is None:
            if time.monotonic() - self._failing_since_s > ttl_s:
                await self._leave()
            return
        if self._lease is None or not await self._etcd.keep_alive(self._lease):
            self._lease = self._written = None
            self._lease = await self._etcd.grant(ttl_s)
        # A key that says something else is another registrar's for the same url: writing it back
        # each time would make two instances of it, in turns.
        if self._written != wanted or await self._etcd.get(wanted.key) is None:
            await self._etcd.put(wanted.key, wanted.encode(), lease=self._lease)
            self._written = wanted
            logger.info("registered as %s", wanted.key)

    async def _leave(self) -> None:
        """Raises EtcdError."""
        if self._lease is not None:
            await self._etcd.revoke(self._lease)
            self._lease = self._written = None
            logger.info("registered no more")


async def _run(settings: RegisterSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # A look must not go out on a connection that the instance is just closing.
    connector = aiohttp.TCPConnector(keepalive_timeout=IDLE_CONNECTION_S)
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        await Registrar(session, settings).run(stop)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m ucm.pd.register",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    roles = [role.value for role in Role]
    add("--role", required=True, choices=roles, help="what the instance does")
    add("--url", required=True, help="the instance, as proxies reach it: http://host:port")
    add("--health-url", help="asked instead of <url>/health")
    add_etcd_flags(parser, is_required=True)
    add(
        "--lease-ttl-s",
        type=_whole_seconds,
        default=RegisterSettings.lease_ttl_s,
        help="how long an instance that is gone stays registered; etcd's shortest is 2",
    )
    add(
        "--interval-s",
        type=seconds_flag,
        default=RegisterSettings.interval_s,
        help="between two looks at the instance, and between two renewals",
    )
    add("--api-key-file", help="the instance's API key, for looks at it; read anew when it changes")
    add_instance_files(parser)
    return parser


def _health_url(given: str | None, instance: str) -> URL:
    """Raises ConfigError."""
    if given is None:
        return instance_url(instance) / "health"
    try:
        url = URL(given)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--health-url: {given!r} is no http://host:port/path")
    return url


def _whole_seconds(text: str) -> int:
    if not text.isdecimal() or seconds_flag(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of seconds from 1 on")
    return int(text)


if __name__ == "__main__":
    main()
