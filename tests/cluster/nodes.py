"""A cluster as tests see it: two nodes that mount one filesystem, and its faults by name."""

from __future__ import annotations

import itertools
import json
import os
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

# Nothing that an agent is asked for takes longer, a fault's deadlines included.
ANSWER_S = 100.0


class NodeFailed(AssertionError):
    """With the node's own traceback."""


class Node:
    """An agent's pipes. One question at a time: `begin`, then `end`; `ask` is both."""

    def __init__(self, name: str, questions_fd: int, answers_fd: int) -> None:
        self.name = name
        self._questions = questions_fd
        self._answers = answers_fd
        self._received = b""
        self._is_asked = False

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        self._line(timeout_s)

    def begin(self, op: str, **what: Any) -> None:
        assert not self._is_asked, f"node {self.name} is at the last question still"
        self._is_asked = True
        os.write(self._questions, json.dumps({"op": op, **what}).encode() + b"\n")

    def end(self, timeout_s: float = ANSWER_S) -> Any:
        answer = json.loads(self._line(timeout_s))
        self._is_asked = False
        if "error" in answer:
            raise NodeFailed(f"node {self.name}: {answer['error']}")
        return answer["result"]

    def ask(self, op: str, **what: Any) -> Any:
        self.begin(op, **what)
        return self.end()

    def run(self, command: str, *, timeout_s: float = 30.0) -> str:
        done = self.ask("run", command=command, timeout_s=timeout_s)
        assert done["status"] == 0, f"node {self.name}: {command}: {done['output']}"
        output: str = done["output"]
        return output

    def settle(self) -> None:
        """After a test that has not heard its last answer."""
        if self._is_asked:
            with suppress(NodeFailed):
                self.end()

    def close(self) -> None:
        os.close(self._questions)
        os.close(self._answers)

    def _line(self, timeout_s: float) -> bytes:
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            if not select.select([self._answers], [], [], max(0.0, left_s))[0]:
                raise NodeFailed(f"node {self.name}: no answer within {timeout_s:g} s")
            received = os.read(self._answers, 1 << 16)
            if not received:
                raise NodeFailed(f"node {self.name}: has ended")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line


@dataclass(frozen=True)
class Fault:
    begin: Callable[[], object]
    end: Callable[[], object]


@dataclass
class Mounted:
    """A node with the filesystem mounted at `path`."""

    node: Node
    path: str
    mount: Callable[[], object]
    unmount: Callable[[], object]
    # Where sockets may be.
    scratch: str

    def ask(self, op: str, store: str, **what: Any) -> Any:
        return self.node.ask(op, store=f"{self.path}/{store}", **what)

    def begin(self, op: str, store: str, **what: Any) -> None:
        self.node.begin(op, store=f"{self.path}/{store}", **what)

    def start(self, store: str, **changes: Any) -> None:
        self.ask("start", store, socket=f"{self.scratch}/{self.node.name}-{store}.sock", **changes)


@dataclass
class Cluster:
    """`faults` by name: what node A, or both, can't do without. With "full" there is no room."""

    name: str
    a: Mounted
    b: Mounted
    faults: Mapping[str, Fault]
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def new_store(self) -> str:
        return f"{self.name}-{next(self._numbers)}"
