"""The figures as a page."""

from __future__ import annotations

from typing import Any

from narrowboat.quantities import format_bytes, format_seconds


def markdown(told: dict[str, Any]) -> str:
    """Of the sections that are there."""
    lines = [
        "# Serving, measured",
        "",
        "`python benchmarks/serve.py`: everything on loopback, server, executor and client on the same cores; raw "
        "numbers in `serve.json`. The client is a process of its own and checks every answer bit for bit.",
        "",
    ]
    for name, write in _SECTIONS.items():
        if name in told:
            lines += write(told[name])
            lines += [_where(told[name]), ""]
    return "\n".join(lines)


def _where(section: dict[str, Any]) -> str:
    quick = ", quick" if section.get("quick") else ""
    return f"At {section['commit']}, {section['date']}, {section['cores']} cores, {section['took_seconds']} s{quick}."


def _overhead(told: dict[str, Any]) -> list[str]:
    lines = [
        "## What the gateway adds",
        "",
        "One client, one request after another, the tiny network (two layers of 16). *Beside the response*: latency "
        "at the client less the executor's own `response_us`; it holds the client's own work too. Medians over "
        f"{told['rounds']} interleaved rounds. The gateway itself counts {_us(told['own_mean_us'])} on average "
        "(`narrowboat_gateway_overhead_seconds`).",
        "",
        "| | requests | latency, median | beside the response, median | 99 % | wrong or lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, way in told["ways"].items():
        beside = way["beside_response_us"]
        lines.append(
            f"| {name} | {beside['n']:,} | {_us(way['latency_us']['p50'])} | {_us(beside['p50'])} | "
            f"{_us(beside['p99'])} | {way['wrong_or_lost']} |"
        )
    return [*lines, ""]


def _throughput(told: dict[str, Any]) -> list[str]:
    lines = [
        "## A thousand requests a second",
        "",
        f"Open loop, {told['rate']:g} requests/s for {told['seconds']:g} s, the tiny network. *Refused*: with a code "
        "that says so; *lost*: no answer, or none within 30 s.",
        "",
        "| | sent | right | wrong | refused | lost | median | 99 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in told["open"].items():
        latency = row["latency_us"]
        lines.append(
            f"| {name} | {row['sent']:,} | {row['ok']:,} | {row['wrong']} | {refused(row)} | "
            f"{row['lost'] + row['hung']} | {_us(latency.get('p50'))} | {_us(latency.get('p99'))} |"
        )
    lines += [
        "",
        f"Closed loop, 32 connections, median of {told['rounds']} interleaved rounds:",
        "",
        "| | requests/s | median | 99 % | not right |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in told["closed"].items():
        lines.append(
            f"| {name} | {row['rate']:,.0f} | {_us(row['p50_us'])} | {_us(row['p99_us'])} | {row['not_right']} |"
        )
    return [*lines, ""]


def refused(row: dict[str, Any]) -> int:
    """Answers that were no 200."""
    return sum(count for status, count in row["statuses"].items() if status != "200")


def _overload(told: dict[str, Any]) -> list[str]:
    guarantee = told["guarantee"]
    said = "; ".join(f"{each['premise']}: {each['said']}" for each in guarantee["broken"]) or "no premise broken"
    verdict = f"Guarantee {'valid' if guarantee['valid'] else 'void'}: {said}."
    lines = [
        "## Overload",
        "",
        f"{told['factor']:g} times every contract for {told['seconds']:g} s. Budget "
        f"{format_bytes(told['budget_bytes'])}, high-water mark {format_bytes(told['peak_bytes'])} over the "
        f"baseline (the kernel's; the process's own, VmHWM, grew by {format_bytes(told['executor_grew_bytes'])} from "
        f"the first request on); executors lost: {told['restarts']:g}. {verdict}",
        "",
        "| task | promised | bound | sent | right | wrong | missed | codes | lost | refusals, median | 99 % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, row in told["streams"].items():
        codes = ", ".join(f"{status}: {count:,}" for status, count in row["statuses"].items())
        refusal = row["refusal_us"]
        lines.append(
            f"| {name} | {'yes' if name in told['guaranteed'] else 'no'} | {_us(told['bounds_us'].get(name))} | "
            f"{row['sent']:,} | {row['ok']:,} | {row['wrong']} | {missed(told, name)} | {codes} | "
            f"{row['lost'] + row['hung']} | {_us(refusal.get('p50'))} | {_us(refusal.get('p99'))} |"
        )
    return [*lines, ""]


def missed(told: dict[str, Any], task: str) -> int:
    """Deadlines of jobs that were let in."""
    counted = sum(value for labels, value in told["misses"].items() if f'task="{task}"' in labels)
    return max(int(counted), told["streams"][task]["unmet"])


def _kill(told: dict[str, Any]) -> list[str]:
    lines = [
        "## The executor is killed",
        "",
        "SIGKILL under load. *Back*: from the kill to the first right answer to a request that was sent after it. "
        f"From the gateway's start until it served took {format_seconds(told['first_ready_seconds'])}.",
        "",
        "| round | under way then | slowest of these | sent after it | back | without an end |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    for number, row in enumerate(told["rounds"], 1):
        lines.append(
            f"| {number} | {_counts(row['under_way'])} | {format_seconds(row['slowest_seconds'])} | "
            f"{_counts(row['since'])} | {format_seconds(row['back_seconds'])} | {row['never_ended']} |"
        )
    before, after = told["gateway_before"], told["gateway_after"]
    left = ", ".join(told["shared_memory_left"]) or "none"
    lines += [
        "",
        f"Descriptors of the gateway before and after: {before['fds']}, {after['fds']}; threads {before['threads']}, "
        f"{after['threads']}. Names in shared memory that were left in the end: {left}.",
        "",
    ]
    return lines


def _vanish(told: dict[str, Any]) -> list[str]:
    before, after = told["before"], told["after"]
    settled = "never" if told["settled_seconds"] is None else f"after {format_seconds(told['settled_seconds'])}"
    lines = [
        "## Clients that vanish",
        "",
        f"{told['clients']:,} clients in {told['seconds']:g} s, which went when they had sent: "
        f"{', '.join(told['stages'])}. Back to what there was before: {settled}. Afterwards {told['then']['ok']} of "
        f"{told['then']['sent']} requests were answered right; {told['in_flight_after']:g} seemed to be in flight.",
        "",
        "| of the gateway | before | after |",
        "| --- | ---: | ---: |",
    ]
    for key, name in (("connections", "connections"), ("fds", "descriptors"), ("threads", "threads")):
        lines.append(f"| {name} | {before[key]} | {after[key]} |")
    lines.append(f"| resident memory | {format_bytes(before['rss_bytes'])} | {format_bytes(after['rss_bytes'])} |")
    return [*lines, ""]


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{what}: {count:,}" for what, count in sorted(counted.items())) or "none"


def _us(microseconds: float | None) -> str:
    return "" if microseconds is None else format_seconds(microseconds / 1e6)


_SECTIONS = {
    "overhead": _overhead,
    "throughput": _throughput,
    "overload": _overload,
    "kill": _kill,
    "vanish": _vanish,
}
