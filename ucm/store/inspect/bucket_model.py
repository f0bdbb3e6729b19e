"""Whether a bucket has pages of a model, and what can't be told."""

from __future__ import annotations

from typing import Final

from ucm.errors import UcmError
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.blocks.page_names import key_id_in, namespace_name
from ucm.store.inspect.bucket_walk import Bounds, StoredBucket
from ucm.store.inspect.guesses import nearest_differences
from ucm.store.inspect.strands_in_store import has_unknown_strands, like
from ucm.store.inspect.verdicts import Finding, model_findings

_WHERE: Final = "the bucket"
# Some hundred namespaces: with more it is said what was not looked at.
_MAX_REQUESTS: Final = 500
_MAX_S: Final = 10.0


def model_in_bucket(
    bucket: StoredBucket, model: str, manifest: Manifest, key_id: bytes
) -> list[Finding]:
    """Never raises for what storage does. `key_id` is that of the page key, if there is one."""
    bounds = Bounds(_MAX_REQUESTS, _MAX_S)
    try:
        if not has_unknown_strands(manifest):
            own = namespace_name(fingerprint(manifest), key_id)
            if _has_pages(bucket, own, bounds):
                return model_findings(model, True, [], _WHERE)
        found: dict[str, Manifest] = {}
        for name in bucket.namespaces(bounds):
            bounds.spend()
            its = bucket.manifest(name).manifest
            if its is not None:
                found[name] = its
        may_be_its = [
            name
            for name, its in found.items()
            if has_unknown_strands(manifest) and key_id_in(name) == key_id and like(manifest, [its])
        ]
        is_known = any(_has_pages(bucket, name, bounds) for name in may_be_its)
    except UcmError as error:
        text = f"{model}: whether the bucket has pages of it can't be told: {error}"
        return [Finding(check="model", verdict="note", found=text)]
    return model_findings(model, is_known, nearest_differences(manifest, found.values()), _WHERE)


def _has_pages(bucket: StoredBucket, namespace: str, bounds: Bounds) -> bool:
    """By its first ones: manifests outlive pages. Raises TierError, and UcmError out of bounds."""
    return any(page is not None for page in bucket.pages_in(namespace, bounds))
