"""What is publicly claimed of RT-Swap, and what its public code does."""

from __future__ import annotations

from papers_kit.claim import Claim
from papers_kit.verdicts import also, at_least, cannot_without, holds, supported

_ABSTRACT, _CODE = ("rtswap",), ("rtswap-code",)
_EMULATED = "On the emulated device, which proves order and bytes; how fast it is only a GPU can tell."

RTSWAP: tuple[Claim, ...] = (
    Claim(
        "rtswap.schedulable",
        "At least 72 % more task sets are schedulable than with existing approaches, with task sets that demand up to "
        "96.2 % more memory than there is.",
        _ABSTRACT,
        (45, 46, 48),
        "schedulable",
        also(
            "some_admitted",
            rule=at_least(
                "gain", 0.72, tell="{gain:.0%} more than the best other ({best_rival}) at 1.962 times: {told}"
            ),
        ),
        "Other task sets and other baselines than the paper's, which are not public; RT-Swap's rules are judged by a "
        "safe test of ours. Random sets, simulated time.",
    ),
    Claim(
        "rtswap.own-gain",
        "The same claim for RT-Swap's rules as we have them: what they gain over demand paging and whole networks.",
        _ABSTRACT,
        (48,),
        "schedulable",
        at_least("rules_gain", 0.72, tell="{rules_gain:.0%}: {told}"),
        "Worse here says that our sets or our safe test do not reproduce the paper's gain, not that it is not there.",
    ),
    Claim(
        "rtswap.timely",
        "Timing guarantees are kept although networks are swapped.",
        _ABSTRACT,
        (46, 47),
        "promises",
        holds(
            "no_bound_passed",
            "no_deadline_missed",
            "no_memory_beyond",
            tell="{jobs} simulated jobs of {sets} admitted sets at 1.962 times: {over} over their bound, {missed} "
            "late; the nearest came to {nearest:.2f} of it",
        ),
        "By our admission test; RT-Swap's is not in its public code.",
    ),
    Claim(
        "rtswap.run",
        "Networks that demand 96.2 % more than the device has run on it together, with their results.",
        _ABSTRACT,
        (37, 40, 43),
        "volumes",
        holds(
            "same_bits",
            "within_limit",
            "none_failed",
            tell="{models} networks of {demand} in {limit} ({ratio:.3f} times): {jobs} jobs, same bits, peak {peak}",
        ),
        _EMULATED,
    ),
    Claim(
        "rtswap.transparent",
        "Swapping is transparent: the model is not changed for it (its PyTorch part replaces one file of PyTorch).",
        ("rtswap", "rtswap-code"),
        (25, 49),
        "structure",
        holds("same_modules", "same_parameters", tell="{model}: class, module tree and parameters as before"),
    ),
    Claim(
        "rtswap.frameworks",
        "Implemented on two frameworks, PyTorch 2.1.1 and Darknet.",
        ("rtswap", "rtswap-code"),
        (25,),
        "machine",
        supported("darknet", tell="PyTorch {torch} only", otherwise="one of the two"),
    ),
    Claim(
        "rtswap.address",
        "A memory object keeps its virtual address over swaps; physical chunks are mapped behind it on demand.",
        _CODE,
        (26, 28, 30),
        "swapping",
        holds("addresses_and_bytes_unchanged", tell="{bytes} out and back: same address, every byte the same"),
        _EMULATED,
    ),
    Claim(
        "rtswap.chunks",
        "Chunks have a size that can be set (32 MiB in one version, 2 MiB in the other).",
        _CODE,
        (29, 36),
        "swapping",
        holds("chunk_as_asked", tell="chunks of {sizes}"),
    ),
    Claim(
        "rtswap.partial",
        "Swap-out can be partial, by amount and in chunks; swap-in restores all of it.",
        _CODE,
        (31,),
        "swapping",
        holds(
            "parts_move",
            "addresses_and_bytes_unchanged",
            tell="{part} of {bytes} out and back, and all of it, and by steps; digests verified",
        ),
        _EMULATED,
    ),
    Claim(
        "rtswap.released",
        "What is swapped out is really given back to the device.",
        _CODE,
        (32,),
        "swapping",
        holds("memory_given_back", tell="free memory of the device rises and falls by exactly what moved"),
        _EMULATED,
    ),
    Claim(
        "rtswap.unaccessed",
        "Memory objects that inference never touches are found and freed.",
        _CODE,
        (27, 33),
        "sharing_memory",
        holds(
            "unused_never_read",
            "half_close",
            tell="a network with {unused} that no pass uses runs from {least} on; passes read {read}",
        ),
    ),
    Claim(
        "rtswap.limit",
        "A limit for all tasks' device memory (MEM_LIMIT) is never passed.",
        _CODE,
        (36, 43),
        "volumes",
        holds("within_limit", tell="peak {peak} of {limit}"),
        _EMULATED,
    ),
    Claim(
        "rtswap.order",
        "Whole jobs run without preemption by earliest deadline; a job whose swap-in has just ended goes first.",
        _CODE,
        (39, 41),
        "volumes",
        holds(
            "one_job_at_a_time",
            "earliest_or_forced",
            tell="{earliest} runs by deadline, {forced} forced by a swap-in, {neither} neither",
        ),
    ),
    Claim(
        "rtswap.overlap",
        "Swapping goes on beside another task's execution, one swap at a time.",
        _CODE,
        (40,),
        "volumes",
        holds(
            "one_swap_at_a_time",
            "overlaps",
            tell="{swaps} swaps, never two at once, {overlapped_ms:.0f} ms of them beside another task's job",
        ),
    ),
    Claim(
        "rtswap.victim",
        "The victim is the task scheduled last that has something to give; only what is needed goes out.",
        _CODE,
        (42,),
        "volumes",
        holds(
            "latest_is_victim",
            "only_what_is_needed",
            "in_chunks",
            tell="{victims_right} of {outs} swap-outs from it ({victims_unclear} unclear, {victims_wrong} not); "
            "{partial} took part of a network",
        ),
    ),
    Claim(
        "rtswap.release",
        "Periodic tasks with implicit deadlines are released together and without drift.",
        _CODE,
        (37, 38),
        "volumes",
        holds("released_on_time", tell="every release of {jobs} jobs a whole number of periods after the start"),
    ),
    Claim(
        "rtswap.misses",
        "Missed deadlines are found and logged, job by job.",
        _CODE,
        (44,),
        "promises",
        holds("late_are_told", tell="of an overloaded set {late} late jobs, each told with its cause"),
    ),
    Claim(
        "rtswap.config",
        "Tasks, periods, swap volumes and objects come from configuration lines.",
        _CODE,
        (35, 49),
        "configuration",
        holds(
            "sample_read",
            "refused_with_line",
            tell="its sample lines of both versions are read; {refused} of {broken} broken ones refused with the line",
        ),
    ),
    Claim(
        "rtswap.process",
        "The scheduler is a process of its own, to which tasks register.",
        _CODE,
        (34,),
        "processes",
        holds(
            "apart",
            "job_done",
            "left_cleanly",
            tell="jobs are submitted from here and run in process apart; {jobs} answered, and it is gone afterwards",
        ),
        "Ours holds all networks in the one process; RT-Swap's tasks stay in theirs.",
    ),
    Claim(
        "rtswap.gpu",
        "It runs on GPUs through CUDA's virtual memory management, with memory objects in host memory.",
        ("rtswap", "rtswap-code"),
        (25, 28, 30),
        "machine",
        cannot_without("gpu", "no GPU here"),
        "The calls are tested against a fake driver (tests/arena/device); benchmarks/gpu.py swaps on a real one.",
    ),
)
