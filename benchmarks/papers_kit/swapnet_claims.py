"""What is publicly claimed of SwapNet."""

from __future__ import annotations

from papers_kit.claim import Claim
from papers_kit.verdicts import also, at_least, at_most, cannot_without, holds

_FIRST = ("swapnet",)
_NO_GPU = "no GPU here; and the paper's boards (Jetson class) share one memory between processor and GPU"

SWAPNET: tuple[Claim, ...] = (
    Claim(
        "swapnet.latency",
        "Almost the latency of sufficient memory while a network demands 2.32 to 5.81 times the budget (no number is "
        "public for «almost»; a second-hand summary says 6 % on average, which is what is compared with).",
        ("swapnet", "swapnet-summary"),
        (23, 24),
        "streaming",
        also(
            "within_budget",
            rule=at_most(
                "median_latency",
                1.06,
                tell="{median_latency:.2f} x plain PyTorch (median of {count}; {least_latency:.2f} to "
                "{worst_latency:.2f}, the worst {worst_where}), weights {ratios} times the budget",
            ),
        ),
        "Processor instead of a Jetson's GPU: computing leaves less time to hide reading in, and shares its cores.",
    ),
    Claim(
        "swapnet.applications",
        "Eleven tasks in three applications at 2.32 to 5.81 times the budget, with almost the same latency.",
        _FIRST,
        (23,),
        "applications",
        also(
            "within_budget",
            "none_missed",
            rule=at_most(
                "median_served",
                1.06,
                tell="{tasks} tasks, {applications} applications, {reached} times the budget: served in "
                "{median_served:.2f} x (median; {least_served:.2f} to {worst_served:.2f}), response with waiting "
                "{median_response:.2f} x; {missed} of {jobs} deadlines missed",
            ),
        ),
        "Our own choice of networks and periods; where a ratio is infeasible, the smallest budget that holds the set.",
    ),
    Claim(
        "swapnet.saved",
        "Memory use falls by 35 to 80 % (second hand).",
        ("swapnet-summary",),
        (12,),
        "streaming",
        at_least(
            "saved",
            0.35,
            tell="{saved:.0%} less than plain PyTorch (median; {least_saved:.0%} to {most_saved:.0%})",
        ),
    ),
    Claim(
        "swapnet.accuracy",
        "Parameters and structure stay as they are, so nothing of the accuracy is lost, as it is by compression.",
        ("swapnet", "swapnet-summary"),
        (2,),
        "streaming",
        holds(
            "same_bits",
            "tiled_close",
            tell="the same bits in {whole_count} of {whole_count} cells; {tiled_count} with layers in tiles, at most "
            "{tiled_difference} apart",
        ),
        "Compression is not run beside it: equal bits need no measurement of accuracy.",
    ),
    Claim(
        "swapnet.unchanged",
        "The model itself is not changed: same structure, same parameters.",
        ("swapnet-summary",),
        (2, 7),
        "structure",
        holds("same_modules", "same_parameters", tell="module tree, names, shapes and types of {model} are the same"),
    ),
    Claim(
        "swapnet.blocks",
        "A network is divided into blocks of one or more consecutive layers, which are swapped in and out in order.",
        ("swapnet", "swapnet-review"),
        (1, 3, 7),
        "structure",
        holds("blocks_in_order", tell="{weights_in_blocks} weights in {blocks} blocks, in the order of use"),
    ),
    Claim(
        "swapnet.direct",
        "Swap-in reads by direct I/O past the page cache, so that no second copy of a block lies in memory.",
        ("swapnet-review",),
        (4,),
        "streaming",
        holds(
            "direct_reads",
            "page_cache_stayed",
            tell="direct reads in every cell; the page cache of the file grew by at most {cached}",
        ),
    ),
    Claim(
        "swapnet.channel",
        "Swap-in has a channel of its own, beside the execution.",
        ("swapnet-review",),
        (5, 11),
        "structure",
        holds(
            "own_readers",
            "overlapped",
            tell="threads {readers}; {overlapped_share:.0%} of the reading time something computed",
        ),
    ),
    Claim(
        "swapnet.reference",
        "Assembly by reference: a skeleton without parameters, into which swapped-in blocks go by pointer.",
        ("swapnet-summary",),
        (7, 8, 9),
        "structure",
        holds(
            "by_reference",
            "same_addresses",
            "nothing_copied",
            "nothing_written",
            tell="{operators} operators found their weight inside the arena, at the same addresses in every pass; "
            "nothing copied; {written} written; bookkeeping {skeleton}",
        ),
    ),
    Claim(
        "swapnet.dummy",
        "A dummy model with random parameters costs one more copy of the model in memory; a skeleton spares it.",
        ("swapnet-summary",),
        (7, 10, 22),
        "removed",
        holds(
            "skeleton_is_small",
            "dummy_is_a_copy",
            tell="dummy {dummy_peak} in {dummy_ms:.0f} ms, skeleton {skeleton_peak} in {skeleton_ms:.0f} ms, of "
            "{weights}",
        ),
    ),
    Claim(
        "swapnet.page-cache",
        "Reading through the page cache delays swap-in.",
        ("swapnet-review",),
        (10,),
        "removed",
        at_least("buffered_over", 1.0, tell="put back, a pass takes {buffered_over:.2f} x the time ({model})"),
        "No number is public: at 1.00 it makes no difference, within 10 % it is called the same.",
    ),
    Claim(
        "swapnet.copy",
        "Copying a block once more on its way delays swap-in.",
        ("swapnet-review",),
        (10,),
        "removed",
        at_least("copied_over", 1.0, tell="put back, a pass takes {copied_over:.2f} x the time ({model})"),
        "On this machine the copy is the one from a staging buffer; the paper's is that to the GPU's side.",
    ),
    Claim(
        "swapnet.dispatch",
        "Copy-free dispatch: where processor and GPU share memory, no second copy is made for the GPU.",
        ("swapnet-summary",),
        (6,),
        "sharing_memory",
        holds(
            "nothing_copied",
            "copies_counted",
            "bits_unified",
            "bits_apart",
            tell="emulated device with shared memory: 0 bytes copied; without: {copied}, counted; same bits on both",
        ),
        "Only a Jetson-class board can tell what it gains; discrete GPUs copy.",
    ),
    Claim(
        "swapnet.residual",
        "Partition and scheduling minimise the delay that execution cannot hide.",
        ("swapnet-summary",),
        (11, 13, 14, 15),
        "planning",
        holds(
            "least_delay",
            "never_slower",
            "refusals_explained",
            tell="the scheme with two blocks in memory reached the best of all partitions in {compared} small "
            "networks; ours takes {ours_over_theirs:.3f} of its time on average, never more",
        ),
    ),
    Claim(
        "swapnet.adapt",
        "When the memory available changes, the partition is adjusted without dividing the network anew.",
        ("swapnet-summary",),
        (16, 17, 18),
        "changing",
        holds(
            "always_right",
            "not_divided_again",
            "file_untouched",
            tell="{changes} changes between {least} and {most} in {passes} passes: {wrong} wrong answers, the call "
            "takes {switch_ms:.1f} ms (median), {worst_switch_ms:.1f} at worst",
        ),
    ),
    Claim(
        "swapnet.sharing",
        "Several networks share the memory by their required-memory ratio and a performance score.",
        ("swapnet", "swapnet-summary"),
        (19, 20),
        "sharing",
        holds(
            "sums_to_budget",
            "each_has_its_floor",
            "larger_gets_more",
            "more_gain_gets_more",
            "urgent_gets_more",
            tell="120 MB as {shares}: sums to the budget, each at least what it needs",
        ),
        "The formula is not public; ours is stated in tasks/allocate.py, and is not our default.",
    ),
    Claim(
        "swapnet.pluggable",
        "Other schedulers can be plugged in; the scheme given is an example.",
        ("swapnet-summary",),
        (21,),
        "sharing",
        holds("another_rule_is_used", tell="a rule from another package shared the budget"),
    ),
    Claim(
        "swapnet.llm",
        "The design points a way to large language models on such devices (an outlook).",
        _FIRST,
        (23,),
        "decoding",
        holds(
            "same_tokens",
            "within_budget",
            "class_kept",
            tell="a decoder of {weights} in {budget}: {tokens} tokens, the same as plain transformers', peak {peak}",
        ),
        "A small decoder with random weights; one of 1.1 billion parameters is in benchmarks/generate.md.",
    ),
    Claim(
        "swapnet.power",
        "Power and additional memory of the swapping itself were measured.",
        ("swapnet-summary",),
        (22,),
        "streaming",
        cannot_without("energy", "nothing here counts joules for its users (/sys/class/powercap)"),
    ),
    Claim(
        "swapnet.gpu",
        "It runs under PyTorch on Jetson devices with their GPU.",
        ("swapnet", "swapnet-summary"),
        (6,),
        "machine",
        cannot_without("gpu", _NO_GPU),
        "benchmarks/gpu.py measures discrete GPUs where there are any.",
    ),
)
