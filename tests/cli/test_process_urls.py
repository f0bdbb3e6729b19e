"""What is written as a URL is never taken for a path: it is refused with what to name instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.parts import ROOT, ucm

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    "args",
    [
        ("init", "{}"),
        ("ls", "{}"),
        ("du", "{}"),
        ("verify", "{}"),
        ("inspect", "{}"),
        ("inspect", "abcdef", "{}"),
        ("reclaim", "{}", "--free-gb", 1),
        ("explain", "{}", "--model", "m", "--prompt-file", "/dev/null"),
        ("stat", "{}"),
        ("bench", "{}"),
        ("doctor", "{}"),
        ("doctor", "/tmp", "--peer-mount", "{}"),
    ],
)
def test_a_bucket_by_its_url_is_refused_with_the_settings_that_name_it(
    args: tuple[object, ...],
) -> None:
    done = ucm(*(str(arg).format("s3://kv/models/llama/") for arg in args))
    assert done.returncode == 1 and done.stdout == "" and not (ROOT / "s3:").exists()
    (line,) = done.stderr.splitlines()
    assert 'store_pipeline: "Cache|S3", s3_bucket: kv, s3_prefix: models/llama, and' in line
    assert "ucm doctor FILE" in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("S3://kv", "s3_bucket: kv, and s3_endpoint unless it is AWS"),
        ("gs://kv/llama", "name a directory that is mounted, or a settings file"),
    ],
)
def test_other_urls_are_refused_as_well(url: str, said: str) -> None:
    done = ucm("init", url)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_of_settings_is_no_storage_backend(tmp_path: Path) -> None:
    (tmp_path / "ucm.yaml").write_text("ucm_connectors: []\n")
    done = ucm("init", tmp_path / "ucm.yaml")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "is a file: name a directory of its storage_backends" in done.stderr
