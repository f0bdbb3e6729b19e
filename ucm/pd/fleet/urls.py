"""The addresses of instances, as people spell them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from yarl import URL

from ucm.errors import ConfigError


def instance_urls(
    hosts: Sequence[str] | None, ports: Sequence[int] | None, *, flag: str, default_port: int
) -> tuple[URL, ...]:
    """The instances that `--<flag>-hosts` and `--<flag>-ports` name. Raises ConfigError."""
    if hosts is None and ports is None:
        return ()
    hosts = hosts or ["localhost"]
    if ports is None:
        ports = [default_port]
    elif all(_names_its_port(host) for host in hosts):
        raise ConfigError(f"--{flag}-hosts has the ports already: leave out --{flag}-ports")
    if len(hosts) == 1:
        hosts = [hosts[0]] * len(ports)
    elif len(ports) == 1:
        ports = [ports[0]] * len(hosts)
    if len(hosts) != len(ports):
        raise ConfigError(
            f"--{flag}-hosts names {len(hosts)} hosts and --{flag}-ports {len(ports)} ports: give "
            f"as many of each, or one of either"
        )
    urls = tuple(_url(host, port, flag=flag) for host, port in zip(hosts, ports, strict=True))
    for i, url in enumerate(urls):
        if url in urls[:i]:
            raise ConfigError(f"--{flag}-hosts: {url} is there twice")
    return urls


def instance_url(text: str) -> URL:
    """One instance as a whole URL or host:port. Raises ConfigError."""
    if not _names_its_port(text):
        raise ConfigError(f"{text!r} is no instance: give it as http://host:port")
    return _url(text, 0, flag="instance")


def _names_its_port(host: str) -> bool:
    try:
        url = URL(host if "://" in host else f"http://{host}")
    except ValueError:
        return False
    return "://" in host or (url.explicit_port is not None and host.count(":") == 1) or "]:" in host


def _url(host: str, port: int, *, flag: str) -> URL:
    try:
        if "://" in host:
            url = URL(host)
        elif _names_its_port(host):
            url = URL(f"http://{host}")
        else:
            url = URL.build(scheme="http", host=host.strip("[]"), port=port)
    except ValueError as error:
        raise ConfigError(f"--{flag}-hosts: {host!r} is no host: {error}") from error
    is_host = bool(url.host) and not any(char.isspace() for char in host)
    if url.scheme not in ("http", "https") or not is_host or url.path not in ("", "/"):
        raise ConfigError(f"--{flag}-hosts: {host!r} is no host, host:port or http://host:port")
    assert url.host is not None
    is_run_together = url.host.replace(".", "").isdecimal() and url.host.count(".") != 3
    if is_run_together or "," in url.host:
        raise ConfigError(f"--{flag}-hosts: {host!r} looks like several addresses in one")
    return url.origin()
