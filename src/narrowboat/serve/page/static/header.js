// How things stand, in words: the gateway, the guarantee, the figures of now, and what a screen reader is told.

const STATES = { serving: "good", starting: "wait", restarting: "warn", draining: "warn", stopped: "bad" };
const guarantee = { told: null, asked: 0, missing: false };
const busyBefore = []; // [now_us, busy_us] of the last five seconds

function startHeader() {
  run.on("state", updateState);
  run.on("tick", updateFigures);
  run.on("plan", () => askGuarantee(true));
  run.on("state", () => askGuarantee(true));
  run.on("tick", () => askGuarantee(false));
  setInterval(announce, 10000);
}

function pill(id, kind, text, title = "") {
  const element = byId(id);
  setAttribute(element, "data-is", kind);
  setText(element, text);
  if (element.title !== title) element.title = title;
}

function updateState() {
  if (run.linked) pill("gateway-state", STATES[run.state] ?? "wait", run.state, run.said);
  else pill("gateway-state", "warn", run.state === "connecting" && !run.why ? "connecting" : "reconnecting", run.why);
  updateSaid();
}

/** Why it is not as it should be. */
function updateSaid() {
  const parts = run.linked ? (run.state === "serving" ? [] : [run.said || run.state]) : run.why ? [`${run.why}; what is shown is from before`] : [];
  if (run.linked && guarantee.told && !guarantee.told.valid) {
    const broken = guarantee.told.broken ?? [];
    parts.push(...broken.slice(0, 2).map(({ means, said }) => `Broken: ${means}${said ? ` (${said})` : ""}`));
    if (broken.length > 2) parts.push(`${broken.length - 2} more`);
  }
  if (!parts.length && run.linked && guarantee.told) parts.push(`All that the analysis assumes holds; ${formatCount(guarantee.told.jobs ?? 0)} guaranteed jobs judged`);
  const text = parts.join(". ");
  setText(byId("said"), text);
  setAttribute(byId("said"), "title", text);
}

/** The gateway's own judgement, every two seconds while someone looks. */
async function askGuarantee(now) {
  if (!run.linked || guarantee.missing || document.hidden || (!now && performance.now() - guarantee.asked < 2000)) return;
  guarantee.asked = performance.now();
  try {
    guarantee.told = await api.json("GET", "/v1/guarantee");
  } catch (error) {
    guarantee.told = null;
    guarantee.missing = error.status === 404;
  }
  const { told } = guarantee;
  if (!told) pill("guarantee", "wait", run.plan ? (run.plan.admitted ? "admitted, not watched" : "not admitted") : "not known yet");
  else if (told.valid) pill("guarantee", "good", told.valid_since_start === false ? "valid again" : "valid");
  else pill("guarantee", "bad", "not valid", (told.broken ?? []).map(({ means }) => means).join("\n"));
  updateSaid();
}

function updateFigures() {
  const tick = run.tick;
  if (!tick) return;
  setText(byId("uptime"), formatUptime(tick.now_us / 1e6));
  setText(byId("figure-held"), formatBytes(tick.held_bytes));
  setText(byId("figure-budget"), `of ${formatBytes(tick.budget_bytes)}`);
  const busy = recentBusy(tick), doing = tick.doing ?? {};
  for (const engine of ["compute", "load"]) {
    setText(byId(`figure-${engine}`), formatShare(busy[engine]));
    setText(byId(`doing-${engine}`), doing[engine] ?? "idle");
  }
  const all = Object.values(tick.tasks ?? {}), sum = (key) => all.reduce((total, task) => total + (task[key] ?? 0), 0);
  setText(byId("figure-done"), formatCount(sum("done")));
  setText(byId("figure-missed"), `${formatCount(sum("missed"))} missed`);
  const pending = tick.pending ?? [];
  setText(byId("figure-pending"), String(pending.length));
  setText(byId("figure-next"), pending.length ? pending[0] : "no job");
}

/** Shares of the last five seconds. */
function recentBusy(tick) {
  const now = tick.now_us, spent = tick.busy_us ?? {};
  if (busyBefore.length && busyBefore.at(-1)[0] > now) busyBefore.length = 0;
  busyBefore.push([now, spent]);
  while (busyBefore.length > 2 && busyBefore[1][0] < now - 5e6) busyBefore.shift();
  const [then, before] = busyBefore[0];
  if (now <= then) return tick.busy ?? {};
  return Object.fromEntries(["compute", "load"].map((engine) => [engine, ((spent[engine] ?? 0) - (before[engine] ?? 0)) / (now - then)]));
}

/** Told aloud only when it is another, and at most every ten seconds: no numbers that change all the time. */
function announce() {
  const all = Object.values(run.tick?.tasks ?? {}), missed = all.reduce((total, task) => total + (task.missed ?? 0), 0);
  const parts = [run.linked ? `Gateway ${run.state}` : "Connection lost, trying again"];
  if (run.linked && guarantee.told) parts.push(`guarantee ${guarantee.told.valid ? "valid" : "not valid"}`);
  if (run.tick) parts.push(`budget ${formatBytes(run.tick.budget_bytes)}`, `${missed} ${missed === 1 ? "job" : "jobs"} missed`);
  setText(byId("announce"), `${parts.join(", ")}.`);
}
