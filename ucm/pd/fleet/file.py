"""Instances in a YAML file, read anew when it changes.

prefill:
  - http://10.0.0.1:7800
decode:
  - http://10.0.0.2:7801
worker: []          # for a proxy with --mixed-mode, instead of the other two
"""

from __future__ import annotations

from collections.abc import Mapping

from yarl import URL

from ucm.config.settings import read_yaml
from ucm.errors import ConfigError
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.urls import instance_url

Listed = Mapping[Role, tuple[URL, ...]]


def read_instances(path: str) -> Listed:
    """Raises ConfigError with the file, the place in it and what is wrong."""
    tree = read_yaml(path)
    roles = {role.value: role for role in Role}
    if not isinstance(tree, dict) or not set(tree) <= set(roles):
        names = ", ".join(roles)
        raise ConfigError(f"{path}: expected lists of URLs under some of: {names}")
    found: dict[Role, tuple[URL, ...]] = {}
    for name, urls in tree.items():
        if not isinstance(urls, list):
            raise ConfigError(f"{path}: {name}: expected a list of URLs")
        try:
            found[roles[name]] = tuple(dict.fromkeys(instance_url(str(url)) for url in urls))
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
    return found
