"""What is publicly claimed of SAGE, and what its public code does."""

from __future__ import annotations

from papers_kit.claim import Claim
from papers_kit.verdicts import also, at_least, cannot_without, holds, supported

_ABSTRACT, _NOTES, _CODE = ("sage",), ("sage-notes",), ("sage-code",)

SAGE: tuple[Claim, ...] = (
    Claim(
        "sage.fold",
        "Memory use falls by more than 20-fold against a baseline.",
        _ABSTRACT,
        (61, 62),
        "folds",
        also(
            "within_budget",
            rule=at_least("fold", 20.0, tell="{fold:.1f} times less activations at best ({best}). {told}"),
        ),
        "The baseline and the batch are not public. Counted in activations: with parameters, gradients and optimizer "
        "state, which no batch changes, the ratio is the smaller one that is told.",
    ),
    Claim(
        "sage.models",
        "ResNet-50, DenseNet-121, MobileNet-v2 and BERT-small are trained (second hand).",
        _NOTES,
        (62,),
        "folds",
        at_least("models", 4, tell="{models} of them in about the least memory: {told}"),
        "A quick run trains fewer.",
    ),
    Claim(
        "sage.training-memory",
        "Training takes 5 to 100 times the memory of inference (second hand).",
        _NOTES,
        (62,),
        "footprint",
        at_least("in_range", 4, tell="{in_range} of {models} within that, at batch {batch}: {told}", tolerance=0.0),
        "Most bytes of activations alive at one time; inference frees each as soon as it can.",
    ),
    Claim(
        "sage.hybrid",
        "Checkpointing and micro-batching chosen together at run time beat either alone, set beforehand (the "
        "baselines of the evaluation are second hand, its figures are not public).",
        ("sage", "sage-notes"),
        (58, 61),
        "rivals",
        at_least(
            "rate",
            1.0,
            tell="{rate:.2f} of the static ways' rate at their memory (median; worst {worst_rate:.2f}): {told}",
        ),
        "PyTorch on one thread of a processor, BERT-small; the paper has a GPU of a telephone.",
    ),
    Claim(
        "sage.gradients",
        "Splitting and recomputing leave the gradients of the whole batch.",
        ("sage", "sage-notes"),
        (56, 57),
        "rivals",
        holds(
            "same_gradients",
            "buffers_and_random_same",
            tell="{settings} settings: {with_the_same_bits} with the same bits, {split} split and at most {distance} "
            "apart in float64",
        ),
        "With BatchNorm a split batch has other statistics; ours is then not split, or in lockstep (training.md). "
        "SAGE's public code leaves BatchNorm out of its networks.",
    ),
    Claim(
        "sage.adapt",
        "Training follows a memory budget that changes while it runs.",
        _ABSTRACT,
        (59, 60),
        "adapting",
        holds(
            "each_budget_followed",
            "settles_within",
            "losses_agree",
            "weights_agree",
            tell="{steps} steps under budgets between {least} and {most} ({plans}): the first after a change at most "
            "{first_over} over, the next {settled_over}; weights within {distance} of the plain steps'",
        ),
    ),
    Claim(
        "sage.order",
        "Micro-batches first, down to where the GPU is no longer busy, then checkpointing (second hand).",
        _NOTES,
        (58,),
        "adapting",
        at_least(
            "alone_over_ours",
            1.0,
            tell="from much to little: {kinds}; accumulation alone takes up to {alone_over_ours:.2f} x our predicted "
            "time, and has no plan at {deeper} of {budgets} budgets",
        ),
        "Ours takes whatever is predicted fastest, which may be the other order.",
    ),
    Claim(
        "sage.graph-level",
        "Fusing operators and recomputing small subgraphs lower the footprint.",
        ("sage", "sage-code"),
        (53, 54),
        "techniques",
        holds(
            "reduction_helps",
            tell="smallest budget of {model} without techniques {none}; with one alone: {told}",
        ),
        "Ours fuses on request only (it changes roundings).",
    ),
    Claim(
        "sage.fusion",
        "Fusing operators alone lowers the footprint.",
        ("sage", "sage-code"),
        (53,),
        "techniques",
        supported("fusion_helps", tell="{none} without, {told}", otherwise="not in this network"),
    ),
    Claim(
        "sage.operator-level",
        "Matrix products and convolutions are made to take less memory themselves.",
        ("sage", "sage-notes"),
        (55,),
        "techniques",
        supported("operators_help", tell="{none} without, {told}", otherwise="not in this network"),
        "PyTorch's own kernels; ours exchanges some on request (low_memory).",
    ),
    Claim(
        "sage.checkpointing",
        "What is evicted is recomputed when it is asked for.",
        ("sage", "sage-code"),
        (50, 56),
        "techniques",
        holds("recompute_helps", tell="with recomputing alone the smallest budget falls: {told}, from {none}"),
    ),
    Claim(
        "sage.oom",
        "An allocation that fails in the middle of a step frees memory, and the step goes on.",
        _CODE,
        (56,),
        "failing",
        holds(
            "done_again",
            "as_if_nothing",
            tell="given up and done again {repeated} time on a smaller plan; weights {distance} from the plain steps'",
        ),
        "Theirs resumes at the operator that failed; ours does the same batch again.",
    ),
    Claim(
        "sage.second-order",
        "Backward passes are graphs themselves, so higher derivatives work.",
        _CODE,
        (50, 51),
        "failing",
        supported("second_order", tell="a loss that differentiates inside: {refused}", otherwise="refused by us"),
    ),
    Claim(
        "sage.once",
        "A step is compiled once and run many times.",
        _CODE,
        (52,),
        "adapting",
        holds("plan_kept", tell="the next step under the same budget runs the same plan"),
    ),
    Claim(
        "sage.energy",
        "Energy was evaluated.",
        _ABSTRACT,
        (62,),
        "machine",
        cannot_without("energy", "nothing here counts joules for its users (/sys/class/powercap)"),
    ),
    Claim(
        "sage.phones",
        "It trains on smartphones and their GPUs.",
        _ABSTRACT,
        (62,),
        "machine",
        cannot_without("phone", "narrowboat needs Linux and PyTorch; no phone is at hand"),
    ),
)
