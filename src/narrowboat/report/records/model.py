"""Records of one model's runs, plans and profiles, as their files say it; sizes in bytes, times in milliseconds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Signed = Annotated[int, Field(ge=-(1 << 60), le=1 << 60)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Millis = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Told(BaseModel):
    """Base: what else a file says is left out, and nothing is changed after reading."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class About(Told):
    """Which command, which versions, which machine, when; see ``machine.about``. Empty where a file does not tell."""

    when: str = ""
    command: str = ""
    narrowboat: str = ""
    torch: str = ""
    python: str = ""
    kernel: str = ""
    processor: str = ""
    cores: Count = 0
    threads: str = ""
    memory_bytes: Bytes = 0


class BlockRow(Told):
    """One block of a run or a plan; times that are not known are None."""

    name: str
    bytes: Bytes
    read_bytes: Bytes = 0
    resident: bool = False
    predicted_compute_ms: Millis | None = None
    compute_ms: Millis | None = None
    predicted_stall_ms: Millis | None = None
    stall_ms: Millis | None = None


class Budgeted(Told):
    """Where a budget goes: what runs and plans have in common."""

    model: str = ""
    weights: str = ""
    budget_bytes: Bytes
    min_budget_bytes: Bytes
    weight_bytes: Bytes
    resident_bytes: Bytes
    window_bytes: Bytes
    fixed_parts: dict[str, Bytes] = Field(default_factory=dict)
    tiled_layers: dict[str, Count] = Field(default_factory=dict)
    predicted_latency_ms: Millis
    predicted_stall_ms: Millis = 0.0
    bound_ms: Millis = 0.0
    about: About = About()

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Names and bytes of what the budget pays for."""
        weights = [("resident weights", self.resident_bytes), ("window", self.window_bytes)]
        return [*weights, *self.fixed_parts.items()]


class RunRecord(Budgeted):
    """``narrowboat run --json``, or a session: the attributes are those of ``RunReport``."""

    latency_ms: list[Millis]
    stall_ms: list[Millis]
    bytes_read: list[Bytes]
    peak_bytes: Bytes
    bit_identical: bool | None = None
    difference: str = ""
    direct_io: bool = False
    first_answer_ms: Millis | None = None
    allocator_policy: str = ""
    copied_bytes: Bytes = 0
    device: str = "cpu"
    predicted_ms: list[Millis] = Field(default_factory=list)
    predicted_bytes_read: Bytes = 0
    blocks: list[BlockRow] = Field(default_factory=list)
    memory: list[tuple[Millis, Signed]] = Field(default_factory=list)

    @property
    def steady_ms(self) -> list[float]:
        """Latencies without the first two passes, which fill memory and are planned before anything was measured."""
        return self.latency_ms[2:] or self.latency_ms[-1:]


class CurveRow(Told):
    """One budget of a curve."""

    budget_bytes: Bytes
    predicted_latency_ms: Millis
    bound_ms: Millis = 0.0
    bytes_read_per_pass: Bytes = 0
    all_resident: bool = False


class MeasuredRow(Told):
    """One budget at which passes were run."""

    budget_bytes: Bytes
    latency_ms: Millis


class PlanRecord(Budgeted):
    """``narrowboat plan --json``, with ``--blocks`` and ``--curve`` where they were given; or a plan."""

    limiter: str
    bytes_read_per_pass: Bytes = 0
    compute_ms: Millis = 0.0
    gap: Number = 0.0
    scheme: str = "best"
    bandwidth_bytes_per_s: Number = 0.0
    advice: list[str] = Field(default_factory=list)
    block_list: list[BlockRow] = Field(default_factory=list)
    curve: list[CurveRow] = Field(default_factory=list)
    measured: list[MeasuredRow] = Field(default_factory=list)


class ProfileBlock(Told):
    """One block as ``narrowboat profile`` measured it."""

    name: str
    bytes: Bytes
    uses: Count = 0
    compute_idle_ms: Millis
    compute_busy_ms: Millis
    activation_bytes: Bytes = 0


class TableRow(Told):
    """One plan of a profile's table."""

    budget: Bytes
    latency_ms: Millis
    lower_bound_ms: Millis = 0.0
    bytes_read: Bytes = 0
    streamed: list[Any] = Field(default_factory=list)


class ProfileRecord(Told):
    """``narrowboat profile -o`` or ``--json``; the attributes are those of ``MeasuredProfile``."""

    model: str = ""
    identity: dict[str, str]
    policy: str
    step_seconds: list[Millis]
    contention: Number | None = None
    needs: dict[str, Signed] = Field(default_factory=dict)
    paces: dict[str, Millis] = Field(default_factory=dict)
    bandwidths: list[Number] = Field(default_factory=list)
    blocks: list[ProfileBlock] = Field(default_factory=list)
    table: list[TableRow] = Field(default_factory=list)
    about: About = About()


class BenchRow(Told):
    """One subject of ``narrowboat bench`` at one budget."""

    subject: str
    budget_bytes: Bytes | None
    latency_ms: Millis | None
    ratio: Number | None = None
    predicted_latency_ms: Millis | None = None
    first_answer_ms: Millis | None = None
    bytes_read: Number | None = None
    peak_bytes: Bytes | None = None
    bit_identical: bool | None = None
    refused: str | None = None
    min_budget_bytes: Bytes | None = None


class BenchRecord(Told):
    """``narrowboat bench --json``."""

    model: str
    weights: str = ""
    passes: Count
    rounds: Count
    rows: list[BenchRow]
    about: About = About()


class GenerateRecord(Told):
    """``narrowboat generate --json``; the attributes are those of ``GenerateReport``."""

    folder: str = ""
    prompt: str = ""
    text: str
    token_ids: list[Any]
    prompt_tokens: Count
    first_token_ms: Millis
    tokens_per_s: Number | None
    bytes_per_token: Number
    bound_tokens_per_s: Number | None
    bandwidth_bytes_per_s: Number
    budget_bytes: Bytes
    min_budget_bytes: Bytes
    peak_bytes: Bytes
    cache_bytes: Bytes = 0
    token_ms: list[Millis] = Field(default_factory=list)
    predicted_token_ms: Millis = 0.0
    pass_ms: list[Millis] = Field(default_factory=list)
    stall_ms: list[Millis] = Field(default_factory=list)
    bytes_read: list[Bytes] = Field(default_factory=list)
    about: About = About()
