"""Manifests with any damage: an error of ours, or one that can be compared and shown."""

from __future__ import annotations

import json

from tests.fuzz.inputs import bad_inputs, bounded, bounds, few_and_many
from ucm.store.blocks.namespace import Manifest, differences, fingerprint, from_json, to_json

HERE = Manifest(
    block_tokens=128,
    model_dtype="bfloat16",
    kv_dtype="bfloat16",
    kv_scales="none",
    num_layers=2,
    num_kv_heads=4,
    k_size=64,
    v_size=64,
    layout="canonical",
    weights="c0ffee" * 8,
    model_shape={"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "heads": [4]},
    epoch=0,
)
_DEEP = 3000
WORDS = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0.0", b"1" * 5000, b"1" * 40),
    *(b"null", b"true", b'"\\ud800"', b'"\\ud800": 1, ', b'"epoch": 3, ', b"{}", b"[]", b"\xff"),
    *(b'"model_shape": ' + b'{"a":' * depth + b"1" + b"}" * depth for depth in (100, _DEEP)),
    *(b"[" * depth + b"]" * depth for depth in (100, _DEEP)),
]
SEEDS = [
    to_json(HERE),
    json.dumps(json.loads(to_json(HERE)), separators=(",", ":")).encode(),
    b"{}",
    *(to_json(HERE).replace(b"4.0", odd) for odd in (b"NaN", b"-1e999", b'"\\ud800"')),
    *(
        to_json(HERE).replace(b'"yarn"', b'{"a":' * n + b"1" + b"}" * n)
        for n in range(100, 950, 50)
    ),
    to_json(HERE).replace(b"[\n      4\n    ]", b"[" * _DEEP + b"]" * _DEEP),
]


@few_and_many
def test_any_manifest_is_an_error_or_can_be_compared_and_shown(num_inputs: int) -> None:
    """Decode's log says in what prefill's namespace differs, whatever lies there."""
    with bounds():
        for data in bad_inputs(SEEDS, num_inputs, words=WORDS):
            with bounded(data):
                there = from_json(data)
                assert (differences(there, HERE) == []) == (fingerprint(there) == fingerprint(HERE))
                assert from_json(to_json(there)) == there
                "\n".join(differences(there, HERE)).encode()
