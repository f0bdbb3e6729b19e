"""Versions of vLLM that are too old are refused, and newer ones than were tried are warned of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ucm.errors import UnsupportedEngine
from ucm.integration.vllm.engine_versions import NEWEST_TRIED, OLDEST, check_version

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.29.1", "0.28.0+cpu", "0.9.2", "0.3.0rc1"])
def test_an_old_one_is_refused_by_its_number(version: str) -> None:
    with pytest.raises(
        UnsupportedEngine, match=r"this is vLLM .* needs 0\.30 or a later one"
    ) as why:
        check_version(version)
    assert version in str(why.value)


@pytest.mark.parametrize("version", ["0.30.0", "0.31.0rc2", "0.32.0", "0.32.1.dev5+g12ab", "dev"])
def test_what_was_tried_and_what_has_no_number_runs_without_a_word(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_version(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.33.0", "0.100.0", "1.0.0"])
def test_a_newer_one_runs_with_a_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert f"this is vLLM {version}, and UCM was tried with versions up to 0.32" in caplog.text


def test_packaging_asks_for_the_same() -> None:
    assert f'vllm = ["vllm>={OLDEST[0]}.{OLDEST[1]}"]\n' in PYPROJECT.read_text()


def test_what_is_installed_for_the_tests_is_what_was_tried() -> None:
    vllm = pytest.importorskip("vllm")
    assert tuple(map(int, vllm.__version__.split(".")[:2])) == NEWEST_TRIED
