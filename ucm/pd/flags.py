"""The proxy's flags, in every spelling of the documents, and what they mean.

A document may name one host and several ports, several hosts and one port, or one port for each
host; a host may come with its port, as a whole URL, or as an IPv6 address.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NoReturn

from yarl import URL

from ucm.errors import ConfigError
from ucm.pd.fleet.etcd_access import EtcdAccess, add_etcd_flags, etcd_access
from ucm.pd.fleet.pool import PoolRules
from ucm.pd.fleet.urls import instance_urls
from ucm.pd.security.credentials import (
    InstanceFiles,
    add_instance_files,
    add_keys,
    add_own_files,
    check_goes_with,
    instance_files,
)

POLICIES = ("least-loaded", "round-robin")
LOOPS = ("asyncio", "uvloop")
AFFINITIES = ("none", "prefix")
HANDOFFS = ("chain", "overlap")
DEFAULT_PREFILL_PORT = 8100
DEFAULT_DECODE_PORT = 8200
DEFAULT_WORKER_PORT = 8100
# Of a number, and of a time: what timers and etcd can take is more.
_MAX_DIGITS = 15
_MAX_S = 1e9


@dataclass(frozen=True, kw_only=True)
class ProxySettings(InstanceFiles):
    """Either `prefillers` and `decoders`, or `workers` that do both, or none of them yet."""

    host: str = "localhost"
    port: int = 8000
    loop: str = "asyncio"
    prefillers: tuple[URL, ...] = ()
    decoders: tuple[URL, ...] = ()
    workers: tuple[URL, ...] = ()
    # All instances do both, those that come later as well.
    mixed_mode: bool = False
    policy: str = "least-loaded"
    affinity: str = "none"
    affinity_min_tokens: int = 512
    affinity_max_ahead: int = 8
    max_places: int = 65536
    handoff: str = "chain"
    min_prefill_tokens: int = 128
    known_for_s: float | None = None
    max_new_tokens: int = 256
    max_known: int = 65536
    max_running: int = 1024
    max_queued: int = 4096
    queue_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    prefill_timeout_s: float = 600.0
    idle_timeout_s: float = 600.0
    answer_timeout_s: float | None = None
    max_answer_mb: int = 64
    silent_after_s: float = 10.0
    websocket_idle_timeout_s: float = 600.0
    health_interval_s: float = 2.0
    breaker_failures: int = 3
    breaker_open_s: float = 5.0
    resume: bool = True
    max_remembered: int = 65536
    max_searched: int = 16
    usage_wait_s: float = 0.25
    shutdown_timeout_s: float = 10.0
    # None: by how many file descriptors there are.
    max_connections: int | None = None
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    prefill_api_key: str | None = None
    prefill_api_key_file: str | None = None
    decode_api_key: str | None = None
    decode_api_key_file: str | None = None
    worker_api_key: str | None = None
    worker_api_key_file: str | None = None
    admin_key: str | None = None
    admin_key_file: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    instances_file: str | None = None
    etcd: EtcdAccess | None = None

    @property
    def is_mixed(self) -> bool:
        return self.mixed_mode or bool(self.workers)

    @property
    def places_from(self) -> int | None:
        return self.affinity_min_tokens if self.affinity == "prefix" else None

    @property
    def pool_rules(self) -> PoolRules:
        return PoolRules(**{each.name: getattr(self, each.name) for each in fields(PoolRules)})

    @property
    def mode(self) -> str:
        """What the log says at the start."""
        if self.is_mixed:
            return f"[Mixed Mode] Initialized {len(self.workers)} PD-mixed workers."
        return (
            f"[PD Mode] Initialized {len(self.prefillers)} prefillers and "
            f"{len(self.decoders)} decoders."
        )


def parse_flags(arguments: Sequence[str] | None, *, description: str) -> ProxySettings:
    """Exits with status 2 and one line on stderr for flags that can't be meant."""
    parser = _parser(description)
    args = parser.parse_args(arguments)
    try:
        return _settings(args)
    except ConfigError as error:
        parser.error(str(error))


def _settings(args: argparse.Namespace) -> ProxySettings:
    def urls(role: str, default_port: int) -> tuple[URL, ...]:
        hosts = _flat(getattr(args, f"{role}_hosts"))
        ports = _flat(getattr(args, f"{role}_ports"))
        return instance_urls(hosts, ports, flag=role, default_port=default_port)

    prefillers = urls("prefiller", DEFAULT_PREFILL_PORT)
    decoders = urls("decoder", DEFAULT_DECODE_PORT)
    workers = urls("worker", DEFAULT_WORKER_PORT)
    if workers and (prefillers or decoders):
        raise ConfigError(
            "--worker-hosts are for instances that do both: give either those, or prefillers and "
            "decoders"
        )
    elsewhere = args.instances_file or args.etcd_addr
    if args.mixed_mode and (prefillers or decoders or not (workers or elsewhere)):
        raise ConfigError(
            "--mixed-mode is for instances that do both: name them by --worker-hosts, "
            "--instances-file or --etcd-addr"
        )
    if bool(prefillers) != bool(decoders) and not elsewhere:
        missing = "decoder" if prefillers else "prefiller"
        raise ConfigError(f"a {missing} is missing: give --{missing}-hosts and --{missing}-ports")
    if not (prefillers or decoders or workers or elsewhere):
        prefillers = (URL.build(scheme="http", host="localhost", port=DEFAULT_PREFILL_PORT),)
        decoders = (URL.build(scheme="http", host="localhost", port=DEFAULT_DECODE_PORT),)
    if args.pd_disaggregation and (workers or args.mixed_mode):
        raise ConfigError("--pd-disaggregation needs prefillers and decoders, not --worker-hosts")
    check_goes_with(args, "ssl_keyfile", "ssl_certfile")
    plain = {
        name: value
        for name, value in vars(args).items()
        if name != "pd_disaggregation"
        and not name.startswith("etcd_")
        and not name.endswith(("_hosts", "_ports"))
    }
    plain["api_key"] = tuple(_flat(args.api_key) or ())
    plain |= vars(instance_files(args))
    # As in URLs, and as a URL of the proxy is likely copied from.
    plain["host"] = plain["host"].removeprefix("[").removesuffix("]")
    return ProxySettings(
        prefillers=prefillers, decoders=decoders, workers=workers, etcd=etcd_access(args), **plain
    )


class OneLineParser(argparse.ArgumentParser):
    """One line for a mistake; argparse prints all flags first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="toy_proxy_server.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, defaults = parser.add_argument, ProxySettings()
    add("--host", default=defaults.host, help="address to listen on")
    add("--port", type=_port, default=defaults.port, help="port to listen on")
    add("--loop", choices=LOOPS, default=defaults.loop, help="uvloop is a package of its own")
    add(
        "--pd-disaggregation",
        action="store_true",
        help="may be left out: prefillers and decoders say so",
    )
    add(
        "--mixed-mode",
        action="store_true",
        help="all instances do both, as --worker-hosts says by itself",
    )
    for role, alias, what in (
        ("prefiller", "prefiller", "compute prompts"),
        ("decoder", "decoder", "answer"),
        ("worker", "work", "do both"),
    ):
        # Given twice, they add up. The singular is what half of the documents use.
        names = dict.fromkeys((f"--{role}", f"--{alias}"))
        more = {"nargs": "+", "action": "append"}
        hosts = list(chain.from_iterable((f"{n}-hosts", f"{n}-host") for n in names))
        ports = list(chain.from_iterable((f"{n}-ports", f"{n}-port") for n in names))
        add(*hosts, dest=f"{role}_hosts", help=f"instances that {what}", **more)  # type: ignore[arg-type]
        add(*ports, dest=f"{role}_ports", type=_port, help="their ports", **more)  # type: ignore[arg-type]
    add("--policy", choices=POLICIES, default=defaults.policy, help="how an instance is chosen")
    add(
        "--affinity",
        choices=AFFINITIES,
        default=defaults.affinity,
        help="prefix: a conversation goes where its pages lie in memory",
    )
    add(
        "--handoff",
        choices=HANDOFFS,
        default=defaults.handoff,
        help="decode is asked when prefill has answered, or at the same time",
    )
    _add_values(parser)
    add(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="a stream that breaks off ends with an error event, instead of on another instance",
    )
    add("--instances-file", help="instances in a YAML file, which is read anew when it changes")
    add_etcd_flags(parser, is_required=False)
    add_keys(parser)
    add_own_files(parser)
    add_instance_files(parser)
    return parser


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Flags that take a number."""
    defaults = ProxySettings()
    for name, kind, text in (
        ("min-prefill-tokens", _count, "prompts that are surely shorter go to decode alone"),
        ("known-for-s", seconds_flag, "what a prefill has computed needs none for so long"),
        ("max-new-tokens", _count, "behind that; prompts with more (a guess) are prefilled"),
        ("max-known", _positive, "beginnings of prompts that are remembered for that"),
        ("affinity-min-tokens", _count, "prompts with fewer (a guess) go where --policy says"),
        ("affinity-max-ahead", _count, "requests more than the least busy one has; then elsewhere"),
        ("max-places", _positive, "beginnings of prompts whose place is remembered"),
        ("max-running", _positive, "requests at one instance; more wait in the proxy"),
        ("max-queued", _count, "requests that wait in the proxy; more are turned away (503)"),
        ("queue-timeout-s", seconds_flag, "how long one waits before it is turned away (503)"),
        ("connect-timeout-s", seconds_flag, "for a connection to an instance"),
        ("prefill-timeout-s", seconds_flag, "for a prefill; then decode computes the prompt"),
        ("idle-timeout-s", seconds_flag, "without a byte from an instance that streams"),
        ("answer-timeout-s", seconds_flag, "for an answer that is not streamed; none: no limit"),
        ("max-answer-mb", _positive, "of an answer that the proxy holds whole, in MiB"),
        ("silent-after-s", seconds_flag, "an instance that says nothing may stand still then"),
        ("websocket-idle-timeout-s", seconds_flag, "of a WebSocket without a message either way"),
        ("health-interval-s", seconds_flag, "between two looks at an instance's /health"),
        ("breaker-failures", _positive, "failed connections before an instance is left alone"),
        ("breaker-open-s", seconds_flag, "how long it is left alone"),
        ("max-remembered", _count, "responses whose instance is remembered; the latest"),
        ("max-searched", _positive, "instances that are asked for one that is not"),
        ("usage-wait-s", seconds_flag, "how long a prefill outlives decode's first byte"),
        ("max-connections", _positive, "of clients; none: a quarter of all files, or 16384"),
        ("shutdown-timeout-s", seconds_flag, "for requests that run when the proxy is stopped"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def _flat(given: list[list[Any]] | None) -> list[Any] | None:
    return None if given is None else [each for group in given for each in group]


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 1 to 65535 is")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def seconds_flag(text: str) -> float:
    """For argparse: a time that passes and ends."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")
    return seconds
