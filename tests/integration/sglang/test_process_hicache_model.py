"""Hypothesis drives storage backends and a dict through the same steps; they must never differ."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.sglang.instances import compute, content, rank
from tests.integration.sglang.recorded import CacheController, MHATokenToKVPoolHost
from tests.store.node.support import Place

pytestmark = pytest.mark.process

NUM_PAGES = 4
_instances = st.integers(0, 1)
_names = st.integers(0, 7).map(lambda number: f"{number:064x}")
_batches = st.lists(_names, max_size=NUM_PAGES)
_steps = st.one_of(
    st.tuples(st.just("set"), _instances, _batches),
    st.tuples(st.just("get"), _instances, _batches),
    st.tuples(st.just("exists"), _instances, st.lists(_names, max_size=9)),
    st.tuples(st.just("again"), _instances, st.just([])),
)
_models = count()


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(layout=st.sampled_from(["layer_first", "page_first"]), steps=st.lists(_steps, max_size=25))
def test_two_instances_of_one_node_are_as_a_dict(place: Place, layout: str, steps) -> None:
    stored: set[str] = set()
    model = f"model {next(_models)}"
    with ExitStack() as stack:

        def start() -> CacheController:
            pool = MHATokenToKVPoolHost(layout, num_pages=NUM_PAGES)
            return stack.enter_context(rank(place, pool=pool, model_id=model))

        instances = [start(), start()]
        for what, number, names in steps:
            one = instances[number]
            if what == "again":
                one.backend.close()
                instances[number] = start()
            elif what == "set":
                set_pages(one, names)
                stored.update(names)
            elif what == "exists":
                expected = [*(name in stored for name in names), False].index(False)
                assert one.backend.batch_exists(names) == expected
            else:
                get_pages(one, names, stored)


def set_pages(one: CacheController, names: list[str]) -> None:
    pages = list(range(len(names)))
    compute(one, names, pages)
    indices = one.pool.indices(pages) if pages else []
    assert one.backend.batch_set_v1(names, indices) == [True] * len(names)


def get_pages(one: CacheController, names: list[str], stored: set[str]) -> None:
    pages = list(range(len(names)))[::-1]
    one.pool.kv_buffer[:] = 0
    indices = one.pool.indices(pages) if pages else []
    expected = [all(each in stored for each in names[: i + 1]) for i in range(len(names))]
    assert one.backend.batch_get_v1(names, indices) == expected
    for name, page, there in zip(names, pages, expected, strict=True):
        if there:
            assert one.pool.page(page) == content(name, one.pool)
