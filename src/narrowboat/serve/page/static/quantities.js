// Bytes and durations, as people write and read them.

const UNITS = { B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
const KINDS = new Map(Object.keys(UNITS).map((unit) => [unit.toLowerCase(), unit]));

/** A number with three significant digits; a whole one as it is. */
function threeDigits(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value)) return String(value);
  return value.toFixed(size >= 99.95 || value === 0 ? 0 : size >= 9.995 ? 1 : 2);
}

/** Bytes in binary units, e.g. "243 MiB". */
function formatBytes(count) {
  if (!Number.isFinite(count)) return "–";
  let size = Math.abs(count), unit = "B";
  for (const larger of ["KiB", "MiB", "GiB", "TiB"]) {
    if (size < 1023.5) break;
    size /= 1024;
    unit = larger;
  }
  return `${count < 0 ? "−" : ""}${unit === "B" ? Math.round(size) : threeDigits(size)} ${unit}`;
}

/** Microseconds in the unit that suits them, e.g. "12.3 ms". */
function formatTime(us) {
  if (us === null || us === undefined || !Number.isFinite(us)) return "–";
  const size = Math.abs(us);
  if (size < 999.5) return `${Math.round(us)} µs`;
  if (size < 999500) return `${threeDigits(us / 1e3)} ms`;
  if (size < 99.95e6) return `${threeDigits(us / 1e6)} s`;
  return formatUptime(us / 1e6);
}

/** Seconds as a clock that goes on, e.g. "3 h 02 min". */
function formatUptime(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${two(Math.floor((whole % 86400) / 3600))} h`;
}

const formatShare = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–");
const formatCount = (count) => Math.round(count).toLocaleString("en").replaceAll(",", "\u202f");

/** Bytes of "200 MiB", or NaN. */
function parseBytes(text) {
  const found = /^\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*$/i.exec(text);
  const unit = found && KINDS.get((found[2] || "b").toLowerCase());
  return unit ? Math.round(Number(found[1]) * UNITS[unit]) : NaN;
}

/** A step of 1, 2 or 5 times a power (of ten, or of two for bytes) that cuts `span` into about `parts`. */
function niceStep(span, parts, binary = false) {
  const rough = Math.max(span / parts, 1e-9);
  if (binary) return 2 ** Math.ceil(Math.log2(rough));
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((k) => k * power >= rough * 0.999);
}
