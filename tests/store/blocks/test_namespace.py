"""Namespaces: what must agree, the fingerprint of it, and the difference in words."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import UcmError, UnsupportedEngine
from ucm.store.blocks.canonical_json import canonical_json
from ucm.store.blocks.model_shape import model_shape
from ucm.store.blocks.namespace import Manifest, differences, fingerprint, from_json, to_json

MANIFEST = Manifest(
    page_format_version=1,
    block_tokens=128,
    model_dtype="bfloat16",
    kv_dtype="bfloat16",
    kv_scales="none",
    num_layers=28,
    num_kv_heads=4,
    k_size=128,
    v_size=128,
    layout="canonical",
    weights="sha256:" + "ab" * 32,
    model_shape={"hidden_size": 3584, "rope": {"rope_theta": 1000000, "rope_type": "default"}},
    epoch=0,
)
# Never edit: stores out there are named by it. Another fingerprint is another MANIFEST_FORMAT.
GOLDEN_FINGERPRINT = "16a8a934af615efcdca98ef755b1aaf12b3acbf1b8b655dd0076e889f38eeeb5"

# The same model with windows in most of its layers.
STRANDS: list[dict[str, object]] = [
    {"name": "", "reach": "all", "num_layers": 4, "layers": [6, 13, 20, 27]},
    {"name": "window-512/4x128+128/2", "reach": "window 512", "num_layers": 24, "layers": [0]},
]
STRANDED = msgspec.structs.replace(MANIFEST, format_version=2, num_layers=4, strands=STRANDS)
GOLDEN_STRANDED_FINGERPRINT = "abd25996133561282a52e86fa08c334480f0b864f98903e1230343f1babfc329"

CHANGES: dict[str, object] = {
    "format_version": 2,
    "page_format_version": 2,
    "block_tokens": 64,
    "model_dtype": "float16",
    "kv_dtype": "fp8_e4m3",
    "kv_scales": "checkpoint",
    "num_layers": 27,
    "num_kv_heads": 8,
    "k_size": 64,
    "v_size": 0,
    "layout": "opaque:cpu-amx-bf16",
    "weights": "model_id:qwen",
    "quantization": "fp8",
    "model_shape": {"hidden_size": 3584},
    "epoch": 1,
    "strands": STRANDS,
}

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=3), json_values, max_size=3)
manifests = st.builds(
    Manifest,
    page_format_version=st.integers(0, 3),
    block_tokens=st.sampled_from([64, 128]),
    model_dtype=st.sampled_from(["bfloat16", "float16"]),
    kv_dtype=st.text(max_size=3),
    kv_scales=st.just("none"),
    num_layers=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    k_size=st.just(64),
    v_size=st.just(64),
    layout=st.just("canonical"),
    weights=st.text(max_size=3),
    model_shape=json_objects,
    epoch=st.integers(0, 2**63),
    strands=st.just(msgspec.UNSET) | st.lists(json_objects, max_size=2),
)


def test_the_fingerprint_of_a_known_manifest_never_changes() -> None:
    """The directory names of every store depend on it."""
    assert fingerprint(MANIFEST).hex() == GOLDEN_FINGERPRINT
    assert fingerprint(STRANDED).hex() == GOLDEN_STRANDED_FINGERPRINT
    assert b"strands" not in to_json(MANIFEST)


def test_every_field_of_the_manifest_is_in_the_fingerprint() -> None:
    """A field that nobody compares might as well not be there."""
    assert set(Manifest.__struct_fields__) == set(CHANGES)

    for name, value in CHANGES.items():
        changed = msgspec.structs.replace(MANIFEST, **{name: value})

        assert fingerprint(MANIFEST) != fingerprint(changed), name
        assert differences(MANIFEST, changed), name


@given(manifest=manifests)
def test_a_manifest_comes_back_from_its_file_as_it_was(manifest: Manifest) -> None:
    """Reading it back gives the same fingerprint, so a manifest can be checked against its
    directory's name."""
    again = from_json(to_json(manifest))

    assert manifest == again
    assert fingerprint(manifest) == fingerprint(again)
    assert to_json(manifest) == to_json(again)


@given(a=manifests, b=manifests)
def test_manifests_without_a_difference_have_one_fingerprint_and_the_reverse(
    a: Manifest, b: Manifest
) -> None:
    """The explanation is complete: never a mismatch that nobody can name."""
    assert (fingerprint(a) == fingerprint(b)) == (differences(a, b) == [])


@given(value=json_values)
def test_canonical_json_is_json_that_says_the_same(value: object) -> None:
    """Canonical means one spelling, not another value."""
    text = canonical_json(value)

    assert value == json.loads(text)
    assert text == canonical_json(json.loads(text))


@given(value=json_objects)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    """A dict remembers how it was filled; a namespace does not."""
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


def test_fingerprints_do_not_depend_on_the_hash_seed() -> None:
    """PYTHONHASHSEED differs between machines, and changes the order of sets."""
    code = (
        "from ucm.store.blocks.canonical_json import canonical_json;"
        "from ucm.store.blocks.model_shape import model_shape;"
        "print(canonical_json(model_shape({'head_dim': 64, 'rope_theta': 1e4, 'hidden_act': 'x'})))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }

    assert len(outputs) == 1


def test_a_difference_names_the_field_and_both_values() -> None:
    """What a person reads in the log when decode finds nothing."""
    here = msgspec.structs.replace(
        MANIFEST,
        kv_dtype="float16",
        model_shape={"hidden_size": 3584, "rope": {"rope_theta": 10000, "factor": 2.5}},
    )

    assert differences(MANIFEST, here, there_label="prefill", here_label="here") == [
        "kv_dtype: bfloat16 (prefill) / float16 (here)",
        "model_shape.rope.factor: absent (prefill) / 2.5 (here)",
        "model_shape.rope.rope_theta: 1000000 (prefill) / 10000 (here)",
        "model_shape.rope.rope_type: default (prefill) / absent (here)",
    ]


def test_a_difference_between_strands_names_the_field_too() -> None:
    other = json.loads(json.dumps(STRANDS))
    other[1] |= {"reach": "window 1024", "name": "window-1024/4x128+128/2"}
    there = msgspec.structs.replace(STRANDED, strands=other)

    assert differences(there, STRANDED) == [
        "strands.1.name: window-1024/4x128+128/2 (there) / window-512/4x128+128/2 (here)",
        "strands.1.reach: window 1024 (there) / window 512 (here)",
    ]


def test_who_has_strands_and_who_has_none_is_told_in_one_line_of_them() -> None:
    """An engine whose hybrid memory manager is off keeps everything of every layer."""
    assert differences(STRANDED, MANIFEST) == [
        "format_version: 2 (there) / 1 (here)",
        "num_layers: 4 (there) / 28 (here)",
        'strands: ["all","window 512"] (there) / absent (here)',
    ]


def test_values_that_look_alike_are_shown_with_their_quotes() -> None:
    """The text "1" and the number 1 are a difference, and must look like one."""
    number = msgspec.structs.replace(MANIFEST, model_shape={"x": 1})
    text = msgspec.structs.replace(MANIFEST, model_shape={"x": "1"})

    assert differences(number, text) == ['model_shape.x: 1 (there) / "1" (here)']


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"{}", to_json(MANIFEST)[:-20], b'{"epoch": "one"}', b"[" * 9999]
)
def test_what_is_no_manifest_is_an_error_of_ours(text: bytes) -> None:
    """A torn manifest in a store must not bring down whoever reads it."""
    with pytest.raises(UcmError, match="not the manifest"):
        from_json(text)


@pytest.mark.parametrize(
    "value", ["NaN", "-1e999", '"\\ud800"', "[" * 40 + "]" * 40], ids=["NaN", "inf", "text", "deep"]
)
def test_what_has_no_fingerprint_is_no_manifest(value: str) -> None:
    """Decode compares with whatever lies there; a comparison must not be what fails."""
    text = to_json(MANIFEST).replace(
        b'"model_shape": {', b'"model_shape": {"x": %b,' % value.encode()
    )
    strands = to_json(MANIFEST)[:-3] + b', "strands": [{"x": %b}]}' % value.encode()

    for each in (text, strands):
        with pytest.raises(UcmError, match="not the manifest of a namespace"):
            from_json(each)


def test_a_manifest_of_a_newer_format_can_still_be_compared() -> None:
    """`ucm doctor` of an older version has to say what differs, not that it can't read."""
    newer = json.loads(to_json(MANIFEST)) | {"format_version": 9, "something": "new"}

    lines = differences(from_json(json.dumps(newer).encode()), MANIFEST)

    assert lines == ["format_version: 9 (there) / 1 (here)"]


def test_model_shape_keeps_what_shapes_kv_and_leaves_the_rest() -> None:
    """Absent fields, empty ones, and those that only training knows are left out."""
    config = {
        "hidden_size": 64,
        "sliding_window": None,
        "attention_dropout": 0.1,
        "_name_or_path": "somewhere",
        "layer_types": ("full_attention", "sliding_attention"),
        "rope_theta": 10000.0,
    }

    assert model_shape(config) == {
        "hidden_size": 64,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope": {"rope_theta": 10000, "rope_type": "default"},
    }


@pytest.mark.parametrize(
    ("transformers_4", "transformers_5"),
    [
        (
            {"rope_theta": 10000, "rope_scaling": None},
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4}},
            {"rope_parameters": {"rope_theta": 1000000, "rope_type": "yarn", "factor": 4.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "rope_type": "default",
                }
            },
        ),
    ],
)
def test_both_spellings_of_rope_are_one_shape(
    transformers_4: dict[str, object], transformers_5: dict[str, object]
) -> None:
    """Instances with different versions of vLLM read the same config.json differently."""
    assert model_shape(transformers_4) == model_shape(transformers_5)


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("rope_theta", 1e4, 1e6),
        ("rope_scaling", None, {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "yarn", "factor": 4}),
        ("rope_parameters", {"full": {"rope_theta": 1}}, {"full": {"rope_theta": 2}}),
        ("sliding_window", None, 4096),
        ("kv_lora_rank", 512, 256),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("num_experts_per_tok", 8, 6),
        ("rope_interleave", None, False),
    ],
)
def test_what_changes_kv_changes_the_shape(name: str, a: object, b: object) -> None:
    """Overrides of the config at the command line are how two equal folders stop being equal."""
    assert model_shape({"head_dim": 64, name: a}) != model_shape({"head_dim": 64, name: b})


def test_longrope_shares_only_between_engines_that_pick_the_same_factors() -> None:
    """vLLM picks them by max_model_len, which is no field of the config."""
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }

    assert model_shape(config, max_model_len=4096) == model_shape(config, max_model_len=2048)
    assert model_shape(config, max_model_len=4096) != model_shape(config, max_model_len=4097)
    assert model_shape(config, max_model_len=8192) == model_shape(config, max_model_len=20000)


@pytest.mark.parametrize("value", [object(), math.nan, math.inf, {1}])
def test_a_config_that_can_not_be_named_is_refused(value: object) -> None:
    """Text that contains an address of this process would be another namespace each time."""
    with pytest.raises(UnsupportedEngine, match="attn_config"):
        model_shape({"attn_config": {"a": value}})
