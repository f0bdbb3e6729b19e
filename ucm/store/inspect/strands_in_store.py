"""The strands of an engine that does not run, told by what engines like it have left in a store.

Only a running engine knows its strands, which are part of its namespace. All else is known of it:
so its namespace is one of those that agree in that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ucm.errors import ConfigError
from ucm.store.blocks.namespace import Manifest, fingerprint, without_strands
from ucm.store.inspect.model_label import model_label
from ucm.store.inspect.walk import manifests_of, namespace_folders

_SHOWN_DIGITS = 12


def has_unknown_strands(manifest: Manifest) -> bool:
    """Of what vLLM tells of an engine that does not run."""
    return manifest.strands == []


def with_strands_of_store(
    manifest: Manifest, backends: Sequence[str], beginning: str = ""
) -> Manifest:
    """The only one of the store's that may be this engine's, and whose name begins so; the engine's
    own if it is known, or if there is none. Raises ConfigError if there are several, and TierError
    where a backend can't be listed."""
    if not has_unknown_strands(manifest):
        return manifest
    folders = [folder for backend in backends for folder in namespace_folders(backend)]
    found = {fingerprint(each).hex(): each for each in like(manifest, manifests_of(folders))}
    named = {name: each for name, each in found.items() if name.startswith(beginning)}
    if len(named) > 1 or (beginning and not named):
        shown = ", ".join(
            f"{name[:_SHOWN_DIGITS]} {model_label(each)}" for name, each in sorted(found.items())
        )
        raise ConfigError(
            f"--namespace {beginning!r}: {len(named)} namespaces of the store begin so that may be "
            f"this engine's, and its log says which one is (UCM namespace ...): of "
            f"{shown or 'none'}"
        )
    return next(iter(named.values()), manifest)


def like(manifest: Manifest, manifests: Iterable[Manifest]) -> list[Manifest]:
    """Those that agree with it in all but their strands."""
    return [each for each in manifests if without_strands(each) == manifest]
