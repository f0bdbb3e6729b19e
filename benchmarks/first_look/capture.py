"""Probes of what another thread may do while an engine captures a CUDA graph in "global" mode.

Each is a process of its own: a capture that is spoiled, or a driver that hangs, ends with it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.first_look.place import GOOD, LOOK, SKIPPED, Finding, Place
from ucm.integration.copies.registration import CudaRegistrar

_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_NBYTES = 16 << 20


def plain_registration(place: Place) -> Finding:
    """Pinning, as any thread would."""
    return _beside_capture(place, lambda: _register(place))


def relaxed_registration(place: Place) -> Finding:
    """Pinning by a thread that has exchanged its capture mode, as NCCL's do."""
    if not place.is_real:
        return Finding(SKIPPED, "the stand-in knows one capture mode")

    def register() -> str:
        if refused := _exchange_capture_mode():
            return refused
        return _register(place)

    return _beside_capture(place, register)


def event_query(place: Place) -> Finding:
    """Asking whether a copy has ended, as lanes do."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU captures nothing")
    event = place.accelerator().record()
    place.synchronize()
    return _beside_capture(place, lambda: "" if event.query() else "it has not happened")


def pinned_allocation(place: Place) -> Finding:
    """A new pinned buffer, as the ring's."""

    def allocate() -> str:
        if place.is_real:
            torch.empty(_NBYTES + 1, dtype=torch.uint8, pin_memory=True)
        else:
            place.stand_in.pinned(_NBYTES)
        return ""

    return _beside_capture(place, allocate)


def copy_on_another_thread(place: Place) -> Finding:
    """A copy from pinned memory on a stream of its own."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU captures nothing")
    accelerator = place.accelerator()
    host, there = accelerator.pinned(_NBYTES), accelerator.empty(_NBYTES)

    def copy() -> str:
        with torch.inference_mode():
            accelerator.use_own_stream()
            accelerator.copy([there], [host])
            accelerator.record()
        return ""

    return _beside_capture(place, copy)


def _beside_capture(place: Place, action: Callable[[], str]) -> Finding:
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU captures nothing")
    if place.is_real and place.device.type != "cuda":
        return Finding(SKIPPED, f"no graphs are captured on {place.device.type} here")
    outcome: list[str] = []

    def act() -> None:
        try:
            outcome.append(action())
        except RuntimeError as error:
            outcome.append(str(error).splitlines()[0])

    thread = threading.Thread(target=act)
    capture = _capture_cuda if place.is_real else _capture_stand_in
    spoiled = capture(place, thread)
    done = outcome[0] if outcome else "it has not returned"
    rows = [
        ("the other thread's call", f"refused: {done}" if done else "worked"),
        ("the capture", f"spoiled: {spoiled}" if spoiled else "intact, and replays"),
    ]
    says = (
        f"{'refused' if done else 'allowed'}, the capture is {'spoiled' if spoiled else 'intact'}"
    )
    return Finding(LOOK if spoiled else GOOD, says, rows)


def _run(thread: threading.Thread) -> None:
    thread.start()
    thread.join(20)


def _capture_stand_in(place: Place, thread: threading.Thread) -> str:
    place.stand_in.capturing = True
    _run(thread)
    place.stand_in.capturing = False
    return "as CUDA may" if place.stand_in.capture_spoiled else ""


def _capture_cuda(place: Place, thread: threading.Thread) -> str:
    """Why the capture is no good; empty if it replays."""
    tensor = torch.zeros(1024, device=place.device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="global"):
            tensor.add_(1)
            _run(thread)
            tensor.add_(1)
        tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if bool((tensor == 2).all()) else "its replay computes something else"


def _register(place: Place) -> str:
    memory = torch.frombuffer(mmap.mmap(-1, _NBYTES), dtype=torch.uint8)
    registrar = CudaRegistrar(place.device) if place.is_real else place.stand_in
    refused = registrar.register(memory.data_ptr(), _NBYTES)
    if not refused:
        _kept.append(memory)
    return refused


# Registered memory must not be unmapped.
_kept: list[torch.Tensor] = []


def _exchange_capture_mode() -> str:
    """Of the calling thread, in the CUDA runtime that torch has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in lines if "libcudart.so" in line}
    if len(libraries) != 1:
        return f"found {len(libraries)} CUDA runtimes in this process"
    mode = ctypes.c_int(_RELAXED)
    error = ctypes.CDLL(libraries.pop()).cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    return f"cudaThreadExchangeStreamCaptureMode: error {error}" if error else ""
