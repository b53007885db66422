"""What the process really takes beside what the plan counts: the peak, whose it is, and whether it is too much."""

from __future__ import annotations

from narrowboat.machine.malloc import trim
from narrowboat.machine.memory import process_memory, resident_bytes

NOISE = 1 << 20  # bytes the interpreter itself comes and goes by
_ROOM_AT_REST = 16  # a sixteenth of the reserve has to be free between passes
_OURS_AT_REST = 16 << 20  # bytes beside the weights that may be ours between passes: heap, objects


class MemoryWatch:
    """Follows the resident memory of the process over a baseline.

    Args:
        baseline: resident bytes of the process when the session began.

    Attributes:
        answered: the peak since the last change of the budget, in bytes over the baseline, that a new plan was made
            for; 0 until one was.
    """

    def __init__(self, baseline: int) -> None:
        self.baseline = baseline
        self.answered = 0
        self._hwm_before = process_memory().hwm
        self._sampled = 0
        self._earlier = 0

    @property
    def peak(self) -> int:
        """Most bytes over the baseline so far."""
        return max(self._earlier, self.recent)

    @property
    def recent(self) -> int:
        """The same since ``begin_anew``: by the kernel's high-water mark if it rose, or by samples."""
        memory = process_memory()
        if memory.hwm < self._hwm_before:
            self._hwm_before = 0  # somebody has reset it, and it tells of the passes since
        most = memory.hwm if memory.hwm > self._hwm_before else max(self._sampled, memory.rss)
        return max(most - self.baseline, 0)

    def begin_anew(self) -> None:
        """Another budget, or a plan that leaves more room, is in force: what was taken before is no overrun of it."""
        self._earlier = self.peak
        self._hwm_before, self._sampled, self.answered = process_memory().hwm, 0, 0

    @property
    def certain(self) -> bool:
        """Whether the recent peak is the kernel's; a sample can have missed it."""
        return process_memory().hwm > self._hwm_before

    def blind(self, budget: int) -> bool:
        """Whether the process was once so large that its high-water mark will tell nothing of passes to come."""
        if self._hwm_before <= self.baseline + budget + NOISE:
            return False  # known without asking the kernel before every pass
        memory = process_memory()
        return self._hwm_before >= memory.hwm > max(memory.rss, self.baseline + budget) + NOISE

    def sample(self) -> None:
        """Look now; a microsecond or two."""
        self._sampled = max(self._sampled, resident_bytes())

    def rest(self, budget: int, reserved: int) -> None:
        """Between passes: note what is held, and give the heap's holes back where they fill the reserve.

        Args:
            budget: bytes over the baseline.
            reserved: of it, for other things than weights.
        """
        resident = process_memory().rss
        self._sampled = max(self._sampled, resident)
        # The holes grow over the first passes. At rest they must leave the next pass room to use others.
        if resident - self.baseline > budget - reserved // _ROOM_AT_REST:
            trim()

    def overrun(self, budget: int, held: int) -> int:
        """Bytes by which passes went over the budget, or over the peak that was last answered; 0 for noise.

        Args:
            budget: bytes over the baseline.
            held: of them, those that the session holds between passes.
        """
        over = self.recent - max(budget, self.answered)
        least = min(budget // 100, NOISE)
        if over <= least:
            return 0
        # What is still there when the heap's holes are gone is the program's own: results it keeps, other models.
        trim()
        over -= max(process_memory().rss - self.baseline - held - _OURS_AT_REST, 0)
        return over if over > least else 0
