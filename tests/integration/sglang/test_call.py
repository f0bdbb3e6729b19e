"""The memory of one call: nothing is copied after it has returned."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from ucm.integration.sglang.call import Call
from ucm.store.api.buffers import HostRow

SLOT = (ctypes.c_char * 8)(*b"the slot")
ADDRESS = ctypes.addressof(SLOT)


def memory(content: bytes = bytes(8)) -> tuple[np.ndarray, HostRow]:
    array = np.frombuffer(bytearray(content), dtype=np.uint8)
    return array, HostRow([array.ctypes.data, array.ctypes.data + 3], (3, 5))


def test_pages_are_filled_and_told_up_to_the_first_that_was_not() -> None:
    arrays, pages = zip(*(memory() for _ in range(4)), strict=True)
    call = Call(pages)
    for number in (0, 1, 3):
        call.rows()[number].load_from(ADDRESS)

    assert call.end() == [True, True, False, False]
    assert [array.tobytes() == b"the slot" for array in arrays] == [True, True, False, True]


def test_after_its_end_no_page_is_written_and_none_is_read() -> None:
    array, page = memory(b"somebody")
    call = Call([page])
    assert call.end() == [False]

    with pytest.raises(RuntimeError):
        call.rows()[0].load_from(ADDRESS)
    assert array.tobytes() == b"somebody"
    target = (ctypes.c_char * 8)()
    with pytest.raises(RuntimeError):
        call.rows()[0].dump_to(ctypes.addressof(target))
    assert bytes(target) == bytes(8)


def test_the_end_waits_for_a_copy_that_is_under_way() -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow(HostRow):
        def load_from(self, address: int) -> None:
            begun.set()
            assert may_end.wait(10)

    call = Call([Slow([1], (8,))])
    copying = threading.Thread(target=call.rows()[0].load_from, args=(ADDRESS,))
    copying.start()
    assert begun.wait(10)
    ended: list[list[bool]] = []
    ending = threading.Thread(target=lambda: ended.append(call.end()))
    ending.start()
    ending.join(0.1)
    assert not ended, "the caller has its memory back while it is written to"
    may_end.set()
    for thread in (copying, ending):
        thread.join(10)
    assert ended == [[True]]
