"""Tables of bad settings: what is wrong, and what the one-line message must contain."""

from __future__ import annotations

from typing import Any

from ucm.config.node_socket import SOCKET_PATH_MAX_BYTES

# The seed's 1p1d configuration, as it stands.
SEED = """\
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1"
      cache_buffer_capacity_gb: 32
enable_event_sync: true
use_layerwise: false
"""


# One key wrong each: what is changed in a good tree, and what the message must contain.
STORE = "ucm_connectors[0].ucm_connector_config"
_S3 = {"store_pipeline": "Cache|S3", "s3_bucket": "pages"}
BAD_STORE: list[tuple[dict[Any, Any], str]] = [
    (
        {"store_pipline": "x"},
        f"{STORE}.store_pipline: unknown setting, did you mean store_pipeline?",
    ),
    (
        {"posix_read_thread": 4},
        "posix_read_thread: unknown setting, did you mean posix_read_threads?",
    ),
    ({"quota_gb": {"salt-tag:0123": 1}}, "quota_gb: salt-tag:0123: expected 16 hex digits"),
    ({"quota_gb": {"salt-tag:" + 16 * "A": 1}}, "expected 16 hex digits behind salt-tag:"),
    ({"wibble": 1}, f"{STORE}.wibble: unknown setting"),
    ({"store_pipeline": "Cache|S3"}, f"{STORE}.s3_bucket: missing: the S3 stage needs a bucket"),
    ({"store_pipeline": "Cache|Posix|S3"}, f"{STORE}.s3_bucket: missing: the S3 stage needs a"),
    (_S3 | {"store_pipeline": "Cache|S3|Posix"}, "store_pipeline: no pipeline"),
    (_S3 | {"store_pipeline": "Posix|S3"}, "store_pipeline: no pipeline"),
    (_S3 | {"s3_bukket": "kv"}, f"{STORE}.s3_bukket: unknown setting, did you mean s3_bucket?"),
    ({"endpoint_url": "x"}, "endpoint_url: unknown setting, did you mean s3_endpoint?"),
    (_S3 | {"s3_bucket": "s3://kv"}, "s3_bucket: expected a bucket's name, without s3:// and"),
    (_S3 | {"s3_bucket": 3}, f"{STORE}.s3_bucket: expected text, got 3"),
    (_S3 | {"s3_region": "US East"}, "s3_region: expected a region such as us-east-1"),
    (_S3 | {"s3_prefix": "a//b"}, "s3_prefix: expected names joined by /"),
    (_S3 | {"s3_prefix": "a/../b"}, "s3_prefix: expected at most 512 characters and no part that"),
    (_S3 | {"s3_endpoint": "host:9000"}, "s3_endpoint: expected http://host:port or https://host"),
    (_S3 | {"s3_endpoint": "http://host/kv"}, "without a path (that is s3_prefix)"),
    (_S3 | {"s3_endpoint": "http://host:port"}, "s3_endpoint: expected http://host:port or"),
    (_S3 | {"s3_endpoint": "http://k:HIDDEN@host"}, "s3_endpoint: has a user in it: credentials"),
    (_S3 | {"s3_endpoint": "http://a host"}, "s3_endpoint: expected http://host:port or"),
    (_S3 | {"s3_endpoint": "http://host?x=HIDDEN"}, 'the bucket, got "http://host"'),
    (_S3 | {"s3_tls_ca_file": "ca.pem"}, 's3_tls_ca_file: expected an absolute path, got "ca.pem"'),
    (_S3 | {"s3_credentials_file": "~/c"}, "s3_credentials_file: expected an absolute path"),
    (_S3 | {"s3_path_style": "yes"}, 's3_path_style: expected true or false, got "yes"'),
    (
        _S3 | {"aws_secret_access_key": "HIDDEN"},
        "aws_secret_access_key: credentials are no settings",
    ),
    (_S3 | {"s3_access_key_id": "HIDDEN"}, "s3_access_key_id: credentials are no settings"),
    ({"secret_key": "HIDDEN"}, "secret_key: credentials are no settings"),
    ({"AWS_SESSION_TOKEN": "HIDDEN"}, "AWS_SESSION_TOKEN: credentials are no settings"),
    ({"node_cache_group": "kv"}, f"{STORE}.node_cache_group: needs node_cache_socket"),
    ({"use_layerwise": True}, "use_layerwise: unknown setting, it belongs at the top level"),
    ({7: 1}, f"{STORE}: the key 7 is not text, quote it"),
    (
        {"store_pipeline": "Cache|Poxis"},
        f'{STORE}.store_pipeline: unknown stage "Poxis", did you mean Posix?',
    ),
    ({"store_pipeline": "Mooncake"}, 'unknown stage "Mooncake", known stages: Cache, Posix'),
    (
        {"store_pipeline": "Posix|Cache"},
        'no pipeline "Posix|Cache": use one of Cache|Posix, Posix, Cache',
    ),
    ({"store_pipeline": "Cache|Cache"}, 'no pipeline "Cache|Cache"'),
    ({"store_pipeline": ""}, 'unknown stage ""'),
    ({"store_pipeline": 3}, "store_pipeline: expected text such as Cache|Posix, got 3"),
    ({"storage_backends": "mnt/kv"}, 'storage_backends: expected absolute paths, got "mnt/kv"'),
    ({"storage_backends": "/a::/b"}, 'expected absolute paths, got ""'),
    ({"storage_backends": ["/a", 3]}, "expected absolute paths, got 3"),
    ({"storage_backends": "~/kv"}, 'expected absolute paths, got "~/kv"'),
    ({"storage_backends": "/a:/b/../a/"}, "storage_backends: /a is given twice"),
    ({"storage_backends": []}, "storage_backends: expected paths, joined by ':' or a list, got []"),
    (
        {"storage_backends": None},
        "storage_backends: expected paths, joined by ':' or a list, got null",
    ),
    (
        {"cache_buffer_capacity_gb": 0},
        "cache_buffer_capacity_gb: expected a number of GiB > 0 and <= 65536, got 0",
    ),
    ({"cache_buffer_capacity_gb": 1e6}, "a number of GiB > 0 and <= 65536, got 1000000"),
    ({"cache_buffer_capacity_gb": "32GB"}, "cache_buffer_capacity_gb: expected a number of GiB"),
    ({"cache_buffer_capacity_gb": float("inf")}, "got Infinity"),
    ({"cache_buffer_capacity_gb": float("nan")}, "got NaN"),
    ({"cache_buffer_capacity_gb": True}, "got true"),
    ({"io_direct": "yes"}, f'{STORE}.io_direct: expected true or false, got "yes"'),
    ({"io_direct": 1}, "io_direct: expected true or false, got 1"),
    ({"posix_read_threads": 0}, "posix_read_threads: expected a whole number >= 1, got 0"),
    ({"posix_read_threads": 257}, "posix_read_threads: expected a whole number <= 256, got 257"),
    ({"posix_write_threads": 2.5}, "posix_write_threads: expected a whole number, got 2.5"),
    ({"posix_write_threads": True}, "posix_write_threads: expected a whole number, got true"),
    (
        {"posix_write_queue_pages": -1},
        "posix_write_queue_pages: expected a whole number >= 1, got -1",
    ),
    ({"posix_io_timeout_ms": None}, "posix_io_timeout_ms: expected a whole number, got null"),
    ({"node_cache_idle_exit_s": 0}, "node_cache_idle_exit_s: expected a number > 0.0, got 0"),
    ({"node_cache_idle_exit_s": float("inf")}, "node_cache_idle_exit_s: expected a number <= "),
    (
        {"node_cache_socket": "ucm.sock"},
        'node_cache_socket: expected an absolute path, got "ucm.sock"',
    ),
    (
        {"node_cache_socket": "/run/ucm/"},
        """node_cache_socket: expected a socket's path, not a directory's, got "/run/ucm/\"""",
    ),
    (
        {"node_cache_socket": "/" + "x" * SOCKET_PATH_MAX_BYTES},
        "has 104 bytes, a socket's path at most 103: set a shorter one",
    ),
    ({"node_cache_socket": 3}, "node_cache_socket: expected text, got 3"),
    ({"page_key_file": "key"}, f'{STORE}.page_key_file: expected an absolute path, got "key"'),
    ({"storage_backends": "/a\ud800"}, f'{STORE}.storage_backends: "/a?" is not Unicode text'),
    ({"storage_backends": ["/b", "/a\udc80"]}, f'{STORE}.storage_backends[1]: "/a?" is not'),
    ({"node_cache_socket": "/a\ud800"}, f'{STORE}.node_cache_socket: "/a?" is not Unicode text'),
    ({"page_key_file": "/a\ud800"}, f'{STORE}.page_key_file: "/a?" is not Unicode text'),
    ({"\ud800": "/a"}, f'{STORE}: "?" is not Unicode text'),
]
BAD_TOP: list[tuple[dict[str, Any], str]] = [
    ({"use_layer_wise": True}, "use_layer_wise: unknown setting, did you mean use_layerwise?"),
    ({"posix_read_threads": 4}, f"posix_read_threads: unknown setting, it belongs in {STORE}"),
    ({"posix_capacity_gb": 4}, f"posix_capacity_gb: unknown setting, it belongs in {STORE}"),
    (
        {"kv_load_failure_policy": "recompute"},
        "kv_load_failure_policy: unknown setting, it belongs beside kv_connector_extra_config",
    ),
    ({"store": {}}, "store: unknown setting"),
    ({"warnings": ()}, "warnings: unknown setting"),
    ({"use_layerwise": "true"}, 'use_layerwise: expected true or false, got "true"'),
    (
        {"block_tokens": 100},
        "block_tokens: expected a whole number that's a multiple of 16, got 100",
    ),
    ({"block_tokens": 0}, "block_tokens: expected a whole number >= 1, got 0"),
    ({"model_id": 7}, "model_id: expected text, got 7"),
    ({"model_id": ""}, "model_id: expected text of length >= 1"),
    ({"epoch": -1}, "epoch: expected a whole number >= 0, got -1"),
    ({"epoch": 1 << 64}, "epoch: expected a whole number <= "),
    ({"epoch_file": "run/epoch"}, 'epoch_file: expected an absolute path, got "run/epoch"'),
    ({"epoch_file": "/run/\udc80"}, 'epoch_file: "/run/?" is not Unicode text'),
    ({"model_id": "\ud800"}, 'model_id: "?" is not Unicode text'),
    ({"epoch_file": "/run/epoch", "epoch": 1}, "epoch: epoch_file is given as well"),
    ({"reset_epoch": "kept"}, 'expected one of new, keep, got "kept", did you mean keep?'),
    (
        {"kv_layout": "opaqe"},
        'kv_layout: expected one of auto, opaque, got "opaqe", did you mean opaque?',
    ),
    ({"lookup_timeout_ms": 0}, "lookup_timeout_ms: expected a whole number >= 1, got 0"),
    ({"max_lookups": "many"}, 'max_lookups: expected a whole number, got "many"'),
    ({"dump_timeout_ms": [1]}, "dump_timeout_ms: expected a whole number, got [1]"),
    ({"ucm_connectors": []}, "ucm_connectors: expected a list with one connector, got 0 of them"),
    ({"ucm_connectors": [{}, {}]}, "expected a list with one connector, got 2 of them"),
    ({"ucm_connectors": {}}, "ucm_connectors: expected a list with one connector, got {}"),
    ({"ucm_connectors": ["x"]}, 'ucm_connectors[0]: expected a mapping, got "x"'),
    (
        {"ucm_connectors": [{}]},
        "ucm_connectors[0].ucm_connector_name: missing: use UcmPipelineStore",
    ),
    (
        {"ucm_connectors": [{"ucm_connector_name": "UcmNfsStore"}]},
        'ucm_connectors[0].ucm_connector_name: no connector "UcmNfsStore": use UcmPipelineStore',
    ),
    (
        {"ucm_connectors": [{"ucm_connector_name": "UcmPipelineStore"}]},
        "ucm_connectors[0].ucm_connector_config: missing: expected a mapping",
    ),
    (
        {
            "ucm_connectors": [
                {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": None}
            ]
        },
        "ucm_connectors[0].ucm_connector_config: expected a mapping, got null",
    ),
    (
        {
            "ucm_connectors": [
                {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": {}}
            ]
        },
        f"{STORE}.storage_backends: missing: the Posix stage needs a directory",
    ),
    (
        {"ucm_connectors": [{"ucm_connector_name": "UcmPipelineStore", "ucm_connector_conf": {}}]},
        "ucm_connectors[0].ucm_connector_conf: unknown setting, did you mean ucm_connector_config?",
    ),
]


# Nine of nine of nine ...: twelve short lines that stand for more values than fit into memory.
LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

BAD_FILES: list[tuple[str | bytes, str]] = [
    ("", "is empty"),
    ("\n  \n", "is empty"),
    ("# only a comment\n", "expected a mapping with ucm_connectors, got null"),
    ("- a\n- b\n", 'expected a mapping with ucm_connectors, got ["a", "b"]'),
    ("just text", "expected a mapping"),
    ("a: [1, 2\n", "line 2: bad YAML: "),
    ("a:\n\t- 1\n", "line 2: bad YAML: "),
    ("a: 1\n---\nb: 2\n", "line 2: bad YAML: but found another document"),
    ("a: !!python/object:os.system {}\n", "line 1: bad YAML: could not determine a constructor"),
    (
        "use_layerwise: true\nepoch: 1\nuse_layerwise: false\n",
        "line 3: bad YAML: use_layerwise is given twice, first on line 1",
    ),
    (SEED + "      io_direct: true\n", "bad YAML"),
    (
        SEED.replace("      store", "      io_direct: 1\n      io_direct: 2\n      store", 1),
        "line 5: bad YAML: io_direct is given twice, first on line 4",
    ),
    ("model_id: 2024-13-45\n", "bad YAML: month must be in 1..12"),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
    ("a: \x07\n", "bad YAML"),
    ("true: 1\n", "the key True is not text, quote it"),
    ("? [1, 2]\n: 3\n", "bad YAML"),
    ("a0: &a0 [x]\n" + LAUGHS, "bad YAML: aliases that stand for more than 100000 values"),
    ("&a {ucm_connectors: *a}\n", "line 1: bad YAML: aliases that stand for more than"),
    ("epoch: !!int ''\n", "bad YAML: "),
    ("use_layerwise: !!bool maybe\n", "bad YAML: "),
    ("epoch: 0x" + "f" * 5000 + "\n", "line 1: bad YAML: a number with too many digits"),
    ("#" * (1 << 20) + "\n", "has more than 1048576 characters, is it the right file?"),
]
