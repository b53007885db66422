"""``Order`` against an explorer that tries every way in which a small program can run.

A program is what host threads do: give streams work on places of a memory, record marks, have streams or themselves
wait for marks, use places themselves, and tell each other what they know. The explorer goes through every reachable
state, where a use of a place has a beginning and an end, and says whether two uses that conflict are ever under way at
once. Two that never are have an order; two that can be, can also run the other way round, and then one of them finds
bytes that are not ready. ``Order``, which sees one run only, has to refuse exactly the programs where that can happen.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from narrowboat.arena.device import lanes
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.lanes import ComputeLane, CopyLane
from narrowboat.arena.device.order import Order
from narrowboat.errors import DeviceOrderError

# A step is a tuple: ("give", stream, kind, place), ("record", stream), ("stream waits", stream, mark),
# ("host waits", mark), ("use", kind, place), ("tell",), ("hear", how-many-eth telling of the other thread).
Step = tuple[Any, ...]
Program = tuple[tuple[Step, ...], ...]  # one list of steps per host thread
PLACES = {0: (0, 64), 1: (64, 64), 2: (32, 64)}  # the last overlaps both


def conflict(one: tuple[str, int], two: tuple[str, int]) -> bool:
    (low, size), (start, nbytes) = PLACES[one[1]], PLACES[two[1]]
    return "write" in (one[0], two[0]) and low < start + nbytes and start < low + size


def some_run_goes_wrong(program: Program) -> bool:
    """Whether two conflicting uses are under way at once in any reachable state."""
    streams = sorted({step[1] for steps in program for step in steps if step[0] in ("give", "record", "stream waits")})
    # What each stream is given, with the host step that gives it; marks by (thread, number among its records).
    work: dict[int, list[tuple[Any, tuple[int, int]]]] = {stream: [] for stream in streams}
    marks: dict[tuple[int, int], tuple[int, int]] = {}
    tellings: dict[tuple[int, int], int] = {}
    for thread, steps in enumerate(program):
        recorded = told = 0
        for at, step in enumerate(steps):
            if step[0] == "give":
                work[step[1]].append((("use", step[2], step[3]), (thread, at)))
            elif step[0] == "record":
                marks[thread, recorded] = (step[1], len(work[step[1]]))
                recorded += 1
                work[step[1]].append((("mark",), (thread, at)))
            elif step[0] == "stream waits":
                work[step[1]].append((("wait", step[2]), (thread, at)))
            elif step[0] == "tell":
                tellings[thread, told] = at
                told += 1

    def passed(state: Any, mark: tuple[int, int]) -> bool:
        stream, place = marks[mark]
        return state[1][streams.index(stream)][0] > place

    # A state: of each thread, and of each stream, how far it is, and whether a use is under way there.
    begin = (tuple((0, False) for _ in program), tuple((0, False) for _ in streams))
    seen, waiting = {begin}, deque([begin])
    while waiting:
        state = waiting.popleft()
        under_way: list[tuple[str, int]] = []
        following: list[Any] = []

        def move(part: int, agent: int, to: tuple[int, bool], state: Any = state, out: Any = following) -> None:
            row = list(state[part])
            row[agent] = to
            out.append((tuple(row), state[1]) if part == 0 else (state[0], tuple(row)))

        for thread, (at, busy) in enumerate(state[0]):
            if at == len(program[thread]):
                continue
            step = program[thread][at]
            if step[0] == "use":
                if busy:
                    under_way.append((step[1], step[2]))
                move(0, thread, (at + 1, False) if busy else (at, True))
            elif (step[0] == "host waits" and not passed(state, step[1])) or (
                step[0] == "hear" and state[0][1 - thread][0] <= tellings[1 - thread, step[1]]
            ):
                continue
            else:
                move(0, thread, (at + 1, False))
        for number, stream in enumerate(streams):
            at, busy = state[1][number]
            if at == len(work[stream]):
                continue
            item, (giver, given_at) = work[stream][at]
            if state[0][giver][0] <= given_at:
                continue
            if item[0] == "use":
                if busy:
                    under_way.append((item[1], item[2]))
                move(1, number, (at + 1, False) if busy else (at, True))
            elif item[0] == "mark" or passed(state, item[1]):
                move(1, number, (at + 1, False))
        if any(conflict(one, two) for i, one in enumerate(under_way) for two in under_way[:i]):
            return True
        for each in following:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return False


def order_refuses(program: Program, kind: type, patch: pytest.MonkeyPatch, hastier: int = 0) -> bool:
    """One run of it on emulated streams.

    Args:
        kind: of the streams.
        hastier: the thread that goes on as long as it can.
    """
    order = Order()
    now = ["thread 0"]
    patch.setattr(lanes, "host_agent", lambda: now[0])
    names = {step[1] for steps in program for step in steps if step[0] in ("give", "record", "stream waits")}
    left: deque[Any] = deque()
    made = {name: kind(order, f"stream {name}", *((left,) if kind is CopyLane else ())) for name in names}
    events: dict[tuple[int, int], Any] = {}
    told: dict[int, list[Any]] = {0: [], 1: []}
    records, at = [0] * len(program), [0] * len(program)

    def do(thread: int, step: Step) -> None:
        if step[0] == "give":
            lane, use = made[step[1]], order.write if step[2] == "write" else order.read

            def prove() -> None:
                use(lane.name, *PLACES[step[3]], step[2])

            if isinstance(lane, CopyLane):
                lane.give(prove, lambda: None)
            else:
                lane.submit()
                prove()
        elif step[0] == "record":
            events[thread, records[thread]] = made[step[1]].record()
            records[thread] += 1
        elif step[0] == "stream waits":
            made[step[1]].wait(events[step[2]])
        elif step[0] == "host waits":
            events[step[1]].wait()
        elif step[0] == "use":
            (order.write if step[1] == "write" else order.read)(now[0], *PLACES[step[2]], step[1])
        elif step[0] == "tell":
            told[thread].append(order.snapshot(now[0]))
        elif step[0] == "hear":
            order.learn(now[0], told[1 - thread][step[1]])

    try:
        while any(at[thread] < len(steps) for thread, steps in enumerate(program)):
            ready = [
                thread
                for thread, steps in enumerate(program)
                if at[thread] < len(steps)
                and not (steps[at[thread]][0] == "hear" and len(told[1 - thread]) <= steps[at[thread]][1])
            ]
            thread = hastier if hastier in ready else ready[0]
            now[0] = f"thread {thread}"
            do(thread, program[thread][at[thread]])
            at[thread] += 1
    except DeviceOrderError:
        return True
    return False


KINDS = st.sampled_from(["read", "write"])
SPOTS = st.sampled_from([0, 0, 0, 1, 2])


@st.composite
def one_thread(draw: st.DrawFn) -> Program:
    steps: list[Step] = []
    records = 0
    for _ in range(draw(st.integers(2, 11))):
        stream = draw(st.sampled_from([0, 0, 1, 1, 2]))
        options = ["give", "give", "use", "record"] + (["stream waits", "host waits"] * 2 if records else [])
        what = draw(st.sampled_from(options))
        mark = (0, draw(st.integers(0, max(records - 1, 0))))
        if what == "give":
            steps.append(("give", stream, draw(KINDS), draw(SPOTS)))
        elif what == "use":
            steps.append(("use", draw(KINDS), draw(SPOTS)))
        elif what == "record":
            steps.append(("record", stream))
            records += 1
        else:
            steps.append((what, stream, mark) if what == "stream waits" else (what, mark))
    return (tuple(steps),)


@st.composite
def two_threads(draw: st.DrawFn) -> Program:
    """Each thread has streams of its own, and waits only for marks that it made or has heard of."""
    steps: list[list[Step]] = [[], []]
    records, tellings, heard = [0, 0], [[], []], [0, 0]  # type: ignore[var-annotated]
    known = [0, 0]  # marks of the other that each thread may wait for
    for _ in range(draw(st.integers(3, 10))):
        thread = draw(st.integers(0, 1))
        other = 1 - thread
        stream = 2 * thread + draw(st.integers(0, 1))
        marks = [(thread, i) for i in range(records[thread])] + [(other, i) for i in range(known[thread])]
        options = ["give", "give", "use", "record", "tell"]
        options += ["stream waits", "host waits"] if marks else []
        options += ["hear"] * 3 if len(tellings[other]) > heard[thread] else []
        what = draw(st.sampled_from(options))
        if what == "give":
            steps[thread].append(("give", stream, draw(KINDS), draw(SPOTS)))
        elif what == "use":
            steps[thread].append(("use", draw(KINDS), draw(SPOTS)))
        elif what == "record":
            steps[thread].append(("record", stream))
            records[thread] += 1
        elif what == "tell":
            steps[thread].append(("tell",))
            tellings[thread].append(records[thread])
        elif what == "hear":
            steps[thread].append(("hear", heard[thread]))
            known[thread] = tellings[other][heard[thread]]
            heard[thread] += 1
        else:
            mark = draw(st.sampled_from(marks))
            steps[thread].append((what, stream, mark) if what == "stream waits" else (what, mark))
    return tuple(steps[0]), tuple(steps[1])


COPY_THEN_KERNEL: Program = ((("give", 0, "write", 0), ("record", 0), ("give", 1, "read", 0)),)
IN_ORDER: Program = (
    (
        ("give", 0, "write", 0),
        ("record", 0),
        ("stream waits", 1, (0, 0)),
        ("give", 1, "read", 0),
        ("record", 1),
        ("stream waits", 0, (0, 1)),
        ("give", 0, "write", 0),
        ("record", 0),
        ("host waits", (0, 2)),
        ("use", "read", 2),
    ),
)
KNOWN_BEFORE_BUT_NOT_NOW: Program = (
    (
        ("give", 0, "write", 0),
        ("record", 0),
        ("stream waits", 1, (0, 0)),
        ("give", 0, "write", 0),
        ("give", 1, "read", 0),
    ),
)


def every_program(length: int) -> Iterator[Program]:
    """Of one thread, two streams and one place; which stream is which does not matter."""

    def longer(steps: tuple[Step, ...], records: int) -> Iterator[Program]:
        if len(steps) == length:
            yield (steps,)
            return
        streams = (0, 1) if steps and any(step[0] != "use" for step in steps) else (0,)
        for stream in streams:
            for kind in ("read", "write"):
                yield from longer((*steps, ("give", stream, kind, 0)), records)
            for mark in range(records):
                yield from longer((*steps, ("stream waits", stream, (0, mark))), records)
            yield from longer((*steps, ("record", stream)), records + 1)
        for kind in ("read", "write"):
            yield from longer((*steps, ("use", kind, 0)), records)
        for mark in range(records):
            yield from longer((*steps, ("host waits", (0, mark))), records)

    return longer((), 0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_every_small_program(length: int) -> None:
    wrong = 0
    with pytest.MonkeyPatch.context() as patch:
        for program in every_program(length):
            expected = some_run_goes_wrong(program)
            assert order_refuses(program, ComputeLane, patch) == expected, program
            wrong += expected
    assert wrong or length == 1


@pytest.mark.parametrize("kind", [ComputeLane, CopyLane])
@settings(max_examples=300, deadline=None)
@given(program=one_thread())
@example(program=COPY_THEN_KERNEL)
@example(program=IN_ORDER)
@example(program=KNOWN_BEFORE_BUT_NOT_NOW)
def test_exactly_the_programs_that_can_go_wrong_are_refused(kind: type, program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert order_refuses(program, kind, patch) == some_run_goes_wrong(program)


@settings(max_examples=400, deadline=None)
@given(program=two_threads())
def test_the_same_with_two_threads_whichever_is_faster(program: Program) -> None:
    wrong = some_run_goes_wrong(program)
    with pytest.MonkeyPatch.context() as patch:
        assert [order_refuses(program, ComputeLane, patch, hastier) for hastier in (0, 1)] == [wrong, wrong]


def test_the_explorer_knows_right_from_wrong() -> None:
    assert some_run_goes_wrong(COPY_THEN_KERNEL)
    assert not some_run_goes_wrong(IN_ORDER)
    assert some_run_goes_wrong(KNOWN_BEFORE_BUT_NOT_NOW)
    assert not some_run_goes_wrong(((("give", 0, "write", 0), ("give", 1, "read", 1)),))
    assert some_run_goes_wrong(((("give", 0, "write", 0), ("give", 1, "read", 2)),))
    assert not some_run_goes_wrong(((("give", 0, "read", 0), ("give", 1, "read", 0), ("use", "read", 2)),))
    assert some_run_goes_wrong(((("use", "write", 0),), (("use", "read", 0),)))
    assert not some_run_goes_wrong(((("use", "write", 0), ("tell",)), (("hear", 0), ("use", "read", 0))))


def test_a_mapping_counts_as_a_use_by_the_host() -> None:
    order = Order()
    order.mapping("host", 0, 100, mapped=True)
    with pytest.raises(DeviceOrderError, match="has not waited for mapping"):
        order.read("stream", 10, 1, "a kernel")
    order.learn("stream", order.snapshot("host"))
    order.read("stream", 10, 1, "a kernel")
    with pytest.raises(DeviceOrderError, match="unmapped while in use"):
        order.mapping("host", 0, 100, mapped=False)
    order.learn("host", order.snapshot("stream"))
    order.mapping("host", 0, 100, mapped=False)
    order.learn("stream", order.snapshot("host"))
    for use in (order.read, order.write):
        with pytest.raises(DeviceOrderError, match="have no memory"):
            use("stream", 99, 1, "a kernel")
        use("stream", 100, 1, "a kernel")
    order.forget(0, 100)
    order.write("somebody else", 99, 1, "a kernel")


def test_knowledge_of_a_device_passes_between_threads_only_by_tokens() -> None:
    device = EmulatedDevice()
    address = device.reserve(1 << 16)
    device.map(address, 1 << 16)
    known, found = device.hand_over(), []
    # Both alive at once: an identifier is only used again when its thread is gone.
    both = threading.Barrier(2)

    def use(token: Any) -> None:
        both.wait()
        if token is not None:
            device.take_over(token)
        try:
            device.kernel_reads(address, 1)
            found.append("right")
        except DeviceOrderError:
            found.append("refused")
        both.wait()

    threads = [threading.Thread(target=use, args=(token,)) for token in (None, known)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["refused", "right"]
