"""Who may ask the proxy, and as whom the proxy asks the engines.

A client has one of the proxy's keys, as a bearer token or as `x-api-key`; who changes instances or
engines has the admin's, which opens all else too. A key of the proxy's own reaches no engine: they
get the key of their side, or what else the client has sent. Without keys of its own the proxy asks
nobody for one, and without a key of a side that side gets the client's.

With keys every path is closed but those below, which say nothing about anybody's prompts. vLLM
closes only some, and `/invocations` and `/tokenize` do what the closed ones do.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from itertools import chain

from multidict import CIMultiDict, CIMultiDictProxy

from ucm.pd.flags import ProxySettings
from ucm.pd.fleet.instance import Role
from ucm.pd.security.keys import Keys

# Who needs Authorization for the engines' own key sends the proxy's here.
ADMIN_HEADER = "X-Ucm-Admin-Key"
ANTHROPIC_HEADER = "x-api-key"
AUTHORIZATION = "Authorization"
# For load balancers, supervisors and Prometheus.
OPEN_PATHS = frozenset({"/health", "/healthcheck", "/ready", "/metrics", "/ping"})

Headers = CIMultiDict[str] | CIMultiDictProxy[str]


class Access:
    """Owned by the event loop's thread. Raises ConfigError for files without keys."""

    def __init__(self, settings: ProxySettings) -> None:
        self._clients = _keys(settings, "api_key", *settings.api_key)
        self._admin = _keys(settings, "admin_key", settings.admin_key)
        self._sides = {
            Role.PREFILL: _keys(settings, "prefill_api_key", settings.prefill_api_key),
            Role.DECODE: _keys(settings, "decode_api_key", settings.decode_api_key),
            Role.WORKER: _keys(settings, "worker_api_key", settings.worker_api_key),
        }

    def following(self) -> list[Coroutine[None, None, None]]:
        """What keeps the keys as their files say, to be run until it is cancelled."""
        every = (self._clients, self._admin, *self._sides.values())
        return [each for keys in every for each in keys.following()]

    def may_ask(self, method: str, path: str, headers: Headers) -> bool:
        """Whether a client may. Preflights of browsers bring no key."""
        if not self._clients.are_asked_for or method == "OPTIONS" or path in OPEN_PATHS:
            return True
        given = chain(*_given(headers).values())
        return any(map(self._clients.has, given)) or self.is_admin(headers)

    def is_admin(self, headers: Headers) -> bool:
        given = headers.getall(ADMIN_HEADER, None) or _bearers(headers)
        return any(map(self._admin.has, given))

    def authorize(self, headers: CIMultiDict[str], role: Role) -> None:
        """Makes a client's headers those for an engine of this role."""
        headers.popall(ADMIN_HEADER, None)
        key = self._sides[role].first
        for name, given in _given(headers).items():
            if key is not None or any(self._clients.has(k) or self._admin.has(k) for k in given):
                headers.popall(name, None)
        headers.update(self.of_the_proxy(role))

    def of_the_proxy(self, role: Role) -> Mapping[str, str]:
        """For what the proxy asks engines by itself."""
        return bearer(self._sides[role].first)


def bearer(key: str | None) -> Mapping[str, str]:
    return {} if key is None else {AUTHORIZATION: f"Bearer {key}"}


def _keys(settings: ProxySettings, name: str, *given: str | None) -> Keys:
    flag = f"--{name.replace('_', '-')}-file"
    file = getattr(settings, f"{name}_file")
    return Keys(tuple(key for key in given if key is not None), file, flag=flag)


def _given(headers: Headers) -> dict[str, list[str]]:
    """The keys that a client has sent, by the header that they came in."""
    return {
        AUTHORIZATION: _bearers(headers),
        ANTHROPIC_HEADER: headers.getall(ANTHROPIC_HEADER, []),
    }


def _bearers(headers: Headers) -> list[str]:
    split = (each.partition(" ") for each in headers.getall(AUTHORIZATION, []))
    return [token for scheme, _, token in split if scheme.lower() == "bearer"]
