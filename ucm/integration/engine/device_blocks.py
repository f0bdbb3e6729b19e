"""Who uses the device blocks of a request, and when vLLM may have them back. Pure.

Between admission and free a request's device blocks are vLLM's; copies borrow them. A load that
vLLM waits for writes blocks, a dump reads them:

    idle ──load──► written ──all ranks──► idle ──dump──► read ──all ranks──► idle
    written, and the request ends:   vLLM frees when it hears of the load's arrival
    read, and the request ends:      HELD ──nothing reads them any more──► released
    any, and vLLM takes them away:   what reads them is fenced in the very next step

Rules, which `check` knows as well:

1. While blocks are written nothing of that request is read: its head waits for the load as the
   rest does.
2. After request_finished vLLM hears of a request exactly once, or never: by its load, if one is
   under way (vLLM itself keeps the blocks until then, whatever it is answered), else by `release`,
   if it was answered that it must keep them, else not at all.
3. Copies that run when vLLM takes blocks away (preemption, or an end at which it names none) end
   before the next step may write into them.

A load of the forward pass that needs it (`use_layerwise`) is over with that pass, and has no entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class BlockReturn(Enum):
    """How vLLM gets the blocks of a request that has finished."""

    AT_ONCE = "nothing copies"
    BY_LOAD = "vLLM waits for the load by itself"
    HELD = "vLLM is told later that nothing reads them any more"


@dataclass(slots=True)
class _Loan:
    loads: set[int] = field(default_factory=set)
    dumps: set[int] = field(default_factory=set)
    held: bool = False

    def is_over(self) -> bool:
        return not (self.loads or self.dumps or self.held)


class BlockLedger:
    """The loans of one engine, by request. Owned by the engine's thread."""

    def __init__(self) -> None:
        self._loans: dict[str, _Loan] = {}
        self._by_job: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def is_loading(self, request_id: str) -> bool:
        loan = self._loans.get(request_id)
        return loan is not None and bool(loan.loads)

    def is_held(self, request_id: str) -> bool:
        """Whether vLLM was told to keep the blocks of this finished request."""
        loan = self._loans.get(request_id)
        return loan is not None and loan.held

    def load(self, request_id: str, job_id: int) -> None:
        self._loan(request_id, job_id).loads.add(job_id)

    def dump(self, request_id: str, job_id: int) -> None:
        self._loan(request_id, job_id).dumps.add(job_id)

    def ended(self, job_id: int) -> None:
        """All ranks have copied."""
        request_id = self._by_job.pop(job_id, None)
        loan = self._loans.get(request_id) if request_id is not None else None
        if request_id is not None and loan is not None:
            loan.loads.discard(job_id)
            loan.dumps.discard(job_id)
            self._forget_if_over(request_id, loan)

    def take_back(self, request_id: str) -> list[int]:
        """vLLM has the blocks again. The dumps that have to be fenced."""
        loan = self._loans.get(request_id)
        if loan is None:
            return []
        fence = sorted(loan.dumps)
        for job_id in fence:
            del self._by_job[job_id]
        loan.dumps.clear()
        self._forget_if_over(request_id, loan)
        return fence

    def finish(self, request_id: str, *, more_to_dump: bool) -> BlockReturn:
        """vLLM has finished the request."""
        loan = self._loans.get(request_id)
        if loan is not None and loan.loads:
            return BlockReturn.BY_LOAD
        if loan is None and not more_to_dump:
            return BlockReturn.AT_ONCE
        loan = self._loans.setdefault(request_id, _Loan())
        loan.held = True
        return BlockReturn.HELD

    def release(self, request_id: str) -> bool:
        """Nothing more of the request will be dumped: whether vLLM is told so now."""
        loan = self._loans.get(request_id)
        if loan is None or not loan.held or loan.dumps or loan.loads:
            return False
        del self._loans[request_id]
        return True

    def check(self) -> None:
        """Raises AssertionError with the broken sentence if a rule of this module fails."""
        for request_id, loan in self._loans.items():
            assert not loan.is_over(), f"{request_id}: a loan without copies is kept"
            assert not (loan.loads and loan.dumps), f"{request_id}: read while it is written"
            assert not (loan.loads and loan.held), f"{request_id}: vLLM would hear of it twice"
            assert all(self._by_job.get(job) == request_id for job in loan.loads | loan.dumps)
        jobs = sum(len(loan.loads) + len(loan.dumps) for loan in self._loans.values())
        assert jobs == len(self._by_job), "a job belongs to one loan"

    def _loan(self, request_id: str, job_id: int) -> _Loan:
        self._by_job[job_id] = request_id
        return self._loans.setdefault(request_id, _Loan())

    def _forget_if_over(self, request_id: str, loan: _Loan) -> None:
        if loan.is_over():
            del self._loans[request_id]
