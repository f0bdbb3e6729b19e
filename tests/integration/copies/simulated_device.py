"""A device that works behind the host's back, for tests: streams, memory and rules like CUDA's.

* A stream is a thread that does what it was asked for in order, each thing after a random delay.
* Device memory is mapped twice. What the host gets to see can't be touched: who reads or writes it
  without asking the device ends the process. The streams use the other mapping.
* The device reads and writes main memory only where it is pinned: registered, within one
  registration, or from `pinned`. Anything else is noted in `violations`, and so is memory that is
  unregistered while a copy still uses it.
* While `capturing`, every call that CUDA refuses meanwhile (registering, allocating pinned memory,
  asking an event) is refused, and spoils the capture. While `failing`, events can't be asked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tests.integration.copies.kv_layouts import Rank
from ucm.integration.copies.accelerator import Accelerator
from ucm.integration.copies.arena import Arena
from ucm.store.blocks.page_layout import PageGeometry

CAPACITY_BYTES = 256 << 20
_ALIGN = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Refused(RuntimeError):
    """What torch makes of CUDA's error 900."""


class Point:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.reached = threading.Event()

    def query(self) -> bool:
        self._device.ask()
        return self.reached.is_set()

    def synchronize(self) -> None:
        self._device.ask()
        assert self.reached.wait(60)


class Stream:
    def __init__(self, seed: int, max_delay_s: float) -> None:
        self._random, self._max_delay_s = random.Random(seed), max_delay_s
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], object] | None) -> None:
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._max_delay_s and self._random.random() < 0.5:
                time.sleep(self._random.random() * self._max_delay_s)
            try:
                with torch.inference_mode():
                    work()
            except Exception as error:  # noqa: BLE001 - of the kernels of tests: shown at the end
                self.errors.append(error)


class SimulatedDevice(Accelerator):
    """Made by the rank's thread. `is_batched`: with a call for many copies at once."""

    def __init__(
        self, *, seed: int = 0, max_delay_s: float = 0.0005, is_batched: bool = False
    ) -> None:
        self._fd = os.memfd_create("device")
        os.ftruncate(self._fd, CAPACITY_BYTES)
        self._seen, self._real = (
            _libc.mmap(None, CAPACITY_BYTES, prot, mmap.MAP_SHARED, self._fd, 0)
            for prot in (0, mmap.PROT_READ | mmap.PROT_WRITE)
        )
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._seed, self._max_delay_s = seed, max_delay_s
        # By the name of the thread that it belongs to.
        self.streams: dict[str, Stream] = {}
        self._current = threading.local()
        self._pinned: list[Tensor] = []
        self._registered: dict[int, int] = {}
        self._in_use: dict[int, int] = {}
        self._rank_thread = threading.current_thread()
        self.capturing = self.failing = self.refuses = False
        self.capture_spoiled = False
        self.violations: list[str] = []
        self.calls: list[str] = []
        super().__init__(torch.device("cpu"), batched=self._copy_batched if is_batched else None)
        self.use_own_stream()

    # -- for tests -------------------------------------------------------------------------

    def launch(self, kernel: Callable[[], object]) -> None:
        """On the calling thread's stream. A kernel reaches device memory by `real`."""
        self._stream.put(kernel)

    def synchronize(self) -> None:
        for stream in list(self.streams.values()):
            done = threading.Event()
            stream.put(done.set)
            assert done.wait(60)

    def close(self) -> None:
        """After the engines."""
        self.synchronize()
        for stream in list(self.streams.values()):
            self._end(stream)
        for address in (self._seen, self._real):
            _libc.munmap(address, CAPACITY_BYTES)
        os.close(self._fd)
        assert self.violations == [], "\n".join(self.violations)

    def forget_memory(self) -> None:
        """Whoever used device memory, and streams of their own, has ended."""
        self.synchronize()
        self.used_bytes = 0
        for name, stream in list(self.streams.items()):
            if stream is not self._stream:
                del self.streams[name]
                self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream.put(None)
        stream._thread.join(60)
        self.violations += [repr(error) for error in stream.errors]

    def real(self, tensor: Tensor) -> Tensor:
        """The same tensor where it can be touched: device memory's other mapping."""
        address = tensor.untyped_storage().data_ptr()
        if not self._seen <= address < self._seen + CAPACITY_BYTES:
            return tensor
        nbytes = tensor.untyped_storage().nbytes()
        flat = _tensor_at(self._real + address - self._seen, nbytes)
        return torch.empty(0, dtype=tensor.dtype).set_(
            flat.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def moved(self, rank: Rank) -> Rank:
        """A rank whose cache lies in device memory. Its `read` waits for nothing."""
        there: dict[int, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []

        def move(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                here = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
                flat = there[storage.data_ptr()] = self.empty(storage.nbytes())
                self.real(flat).copy_(here)
                pairs.append((here, flat))
            return torch.empty(0, dtype=tensor.dtype).set_(
                there[storage.data_ptr()].untyped_storage(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )

        def read() -> Tensor:
            for here, flat in pairs:
                here.copy_(self.real(flat))
            return rank.cache.read()

        layers = [
            move(kv) if isinstance(kv, Tensor) else tuple(move(t) for t in kv)
            for kv in rank.cache.layers
        ]
        return replace(rank, cache=replace(rank.cache, layers=layers, read=read))

    def arena(self, num_pages: int, geometry: PageGeometry) -> Arena:
        nbytes = num_pages * geometry.slot_bytes
        arena = Arena(mmap.mmap(-1, nbytes), registrar=self)
        arena.bytes.fill_(0xEE)
        return arena

    # -- a Registrar -----------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> str:
        if self.capturing:
            self.capture_spoiled = True
            return "error 900: operation not permitted when stream is capturing"
        if self.refuses:
            return "error 2: out of memory"
        with self._lock:
            if any(a < address + nbytes and address < a + n for a, n in self._registered.items()):
                return "error 712: part or all of the requested memory range is already mapped"
            self._registered[address] = nbytes
            self.calls.append(f"register {nbytes}")
        return ""

    def unregister(self, address: int) -> str:
        with self._lock:
            if self._in_use.get(address):
                self.violations.append("unregistered while a copy uses it")
            return "" if self._registered.pop(address, None) else "error 713: not mapped"

    # -- an Accelerator --------------------------------------------------------------------

    @property
    def _stream(self) -> Stream:
        return self._current.stream

    def use_own_stream(self) -> None:
        stream = Stream(self._seed + len(self.streams), self._max_delay_s)
        name = threading.current_thread().name
        self.streams[f"{name} {len(self.streams)}" if name in self.streams else name] = stream
        self._current.stream = stream

    def record(self) -> Point:
        point = Point(self)
        self._stream.put(point.reached.set)
        return point

    def wait(self, event) -> None:
        if threading.current_thread() is not self._rank_thread:
            self.calls.append("wait")
        self._stream.put(event.reached.wait)

    def ask(self) -> None:
        """Before an event is asked."""
        if self.capturing:
            self.capture_spoiled = True
            raise Refused("CUDA error: operation not permitted when stream is capturing")
        if self.failing:
            raise RuntimeError("CUDA error: unspecified launch failure")

    def empty(self, nbytes: int) -> Tensor:
        with self._lock:
            start = self.used_bytes
            self.used_bytes += -(-max(nbytes, 1) // _ALIGN) * _ALIGN
            assert self.used_bytes <= CAPACITY_BYTES, "out of device memory"
        return _tensor_at(self._seen + start, nbytes)

    def pinned(self, nbytes: int) -> Tensor:
        if self.capturing:
            self.capture_spoiled = True
            raise Refused("CUDA error: operation not permitted when stream is capturing")
        with self._lock:
            self._pinned.append(torch.empty(nbytes, dtype=torch.uint8))
            return self._pinned[-1]

    def upload(self, ids) -> Tensor:
        self.calls.append("upload")
        on_device = self.empty(ids.nbytes).view(torch.int64)
        self._stream.put(lambda: self.real(on_device).copy_(torch.from_numpy(ids)))
        return on_device

    def copy(self, into: Sequence[Tensor], out_of: Sequence[Tensor]) -> None:
        for target, source in zip(into, out_of, strict=True):
            self._copy_bytes(source.data_ptr(), target.data_ptr(), target.numel())

    def _copy_batched(self, sources: Tensor, targets: Tensor, sizes: Tensor) -> None:
        self.calls.append(f"batched {sizes.numel()}")
        assert sources.dtype == targets.dtype == sizes.dtype == torch.int64
        for row in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            self._copy_bytes(*row)

    def _copy_bytes(self, source: int, target: int, nbytes: int) -> None:
        used = [self._use(address, nbytes) for address in (source, target)]
        a, b = (self._address(address) for address in (source, target))

        def copy() -> None:
            ctypes.memmove(b, a, nbytes)
            with self._lock:
                for registration in used:
                    self._in_use[registration] -= 1

        self._stream.put(copy)

    def _address(self, address: int) -> int:
        on_device = self._seen <= address < self._seen + CAPACITY_BYTES
        return address - self._seen + self._real if on_device else address

    def _use(self, address: int, nbytes: int) -> int:
        """Notes that a copy uses it: the registration that it is in, or 0."""
        if self._seen <= address and address + nbytes <= self._seen + CAPACITY_BYTES:
            registration = 0
        else:
            with self._lock:
                registration = next(
                    (
                        start
                        for start, size in self._registered.items()
                        if start <= address and address + nbytes <= start + size
                    ),
                    0,
                )
                buffers = [(t.data_ptr(), t.numel()) for t in self._pinned]
            if not registration and not any(
                a <= address and address + nbytes <= a + n for a, n in buffers
            ):
                self.violations.append("a copy of memory that is not pinned, or not in one piece")
        with self._lock:
            self._in_use[registration] = self._in_use.get(registration, 0) + 1
        return registration

    def gather(self, blocks: Tensor, ids: Tensor, into: Tensor) -> None:
        a, b, c = (self.real(t) for t in (blocks, ids, into))
        self._stream.put(lambda: c.copy_(a[:, b]))

    def scatter(self, blocks: Tensor, ids: Tensor, out_of: Tensor) -> None:
        a, b, c = (self.real(t) for t in (blocks, ids, out_of))

        def scatter() -> None:
            a[:, b] = c

        self._stream.put(scatter)


def _tensor_at(address: int, nbytes: int) -> Tensor:
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
