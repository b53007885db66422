"""Every check by its name, in the order in which they run: short ones first."""

from __future__ import annotations

from papers_kit import (
    adapt_checks,
    decoder_checks,
    device_checks,
    machine_checks,
    plan_checks,
    set_checks,
    stream_checks,
    structure_checks,
    task_checks,
    train_checks,
)
from papers_kit.check import Check

CHECKS: dict[str, Check] = {
    "machine": Check(machine_checks.lacks, "what the machine has", 60),
    "planning": Check(plan_checks.planning, "the planner against all partitions of small networks", 120),
    "sharing": Check(plan_checks.sharing, "shares of a budget for three described networks", 60),
    "configuration": Check(set_checks.configuration, "RT-Swap's configuration lines", 60),
    "promises": Check(set_checks.promises, "simulated jobs of admitted sets", 300),
    "schedulable": Check(set_checks.schedulable, "random task sets", 900),
    "swapping": Check(device_checks.swapping, "a slab swapped on the emulated device", 180),
    "sharing_memory": Check(device_checks.sharing_memory, "devices with shared memory and without", 180),
    "volumes": Check(device_checks.volumes, "whole jobs under RT-Swap's rules on the emulated device", 180),
    "processes": Check(machine_checks.processes, "jobs submitted to the executor's process", 180),
    "structure": Check(structure_checks.structure, "a streamed network looked into", 300),
    "changing": Check(structure_checks.changing, "random changes of the budget", 400),
    "decoding": Check(decoder_checks.decoding, "a small decoder", 300),
    "removed": Check(stream_checks.removed, "one removed operation put back at a time", 600),
    "failing": Check(adapt_checks.failing, "memory that runs out in a training step", 240),
    "adapting": Check(adapt_checks.adapting, "another budget for every training step", 700),
    "footprint": Check(train_checks.footprint, "activations of training and of inference", 500),
    "techniques": Check(train_checks.techniques, "smallest training budgets by technique", 900),
    "streaming": Check(stream_checks.streaming, "networks larger than their budget beside plain PyTorch", 1500),
    "rivals": Check(train_checks.rivals, "training beside static ways", 1500),
    "applications": Check(task_checks.applications, "applications with deadlines", 1500),
    "folds": Check(train_checks.folds, "networks trained in the least memory", 1800),
}
