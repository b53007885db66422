// An answer of the analysis: whether it would be, why not, and every bound beside the present one.

/** @param answer of POST /v1/admission @param heading what was asked, e.g. "200 MiB" @param onSuggestion called with bytes */
function showVerdict(box, answer, heading, onSuggestion = null) {
  const { admitted, reasons = [], suggestions = [], plan, change } = answer, parts = [];
  const pause = change ? ` The change pauses the tasks for up to ${formatTime(change.pause_us)}; their deadlines can bear ${formatTime(change.allowed_us)}.` : "";
  parts.push(banner(admitted ? "good" : "bad", admitted ? "✓ Admitted" : "✕ Refused", `${heading}.${admitted ? pause : ""}`));
  if (reasons.length) parts.push(make("h4", {}, "Why"), listOf(reasons));
  if (suggestions.length) parts.push(make("h4", {}, "What would help"), suggestionList(suggestions, onSuggestion));
  if (plan?.tasks?.length) parts.push(boundsTable(plan, admitted, box.id));
  box.replaceChildren(...parts);
}

const banner = (kind, word, text) => make("p", { className: "banner", "data-is": kind }, make("b", {}, word), make("span", {}, text));

/** A suggestion that names a budget gets a button that tries it. */
function suggestionList(suggestions, onSuggestion) {
  return make("ul", {}, ...suggestions.map((text) => {
    const found = onSuggestion && /^budget\D*?([0-9.]+ ?[KMGT]i?B)(?: \(([0-9]+) bytes\))?/i.exec(text);
    if (!found) return make("li", {}, text);
    const bytes = found[2] ? Number(found[2]) : parseBytes(found[1]);
    return make("li", {}, `${text} `, make("button", { type: "button", className: "quiet", onclick: () => onSuggestion(bytes) }, `Look at ${formatBytes(bytes)}`));
  }));
}

function boundsTable(plan, admitted, where) {
  const rows = plan.tasks.map((task) => {
    const now = planned(task.name), before = now ? now.response_bound_us : null, then = task.response_bound_us;
    return [task.name, now ? boundText(now) : "not there", admitted || then !== null || task.guarantee !== "guaranteed" ? boundText(task) : "none found", difference(before, then), formatTime(task.deadline_us)];
  });
  for (const task of run.plan?.tasks ?? []) {
    if (!plan.tasks.some(({ name }) => name === task.name)) rows.push([task.name, boundText(task), "not there", "", formatTime(task.deadline_us)]);
  }
  const table = makeTable("Bounds of the responses, now and then", ["Task", make("span", {}, make("span", { className: "roomy" }, "Bound "), "now"), "Then", "Change", "Deadline"], rows, [1, 2, 3, 4]);
  const scrolled = make("div", { className: "table-box tall", role: "region", tabIndex: 0, "aria-label": `Bounds, ${where.replaceAll("-", " ")}` }, table);
  return make("div", {}, scrolled, make("p", { className: "note" }, `${plan === run.plan ? "It needs" : "It would need"} ${formatBytes(plan.needed_bytes)} of ${formatBytes(plan.budget_bytes)}.`));
}

const boundText = (task) => (task.guarantee === "guaranteed" ? formatTime(task.response_bound_us) : "no bound");

function difference(before, then) {
  if (!before || !then) return "";
  const percent = Math.round((100 * (then - before)) / before);
  if (percent === 0) return "same";
  return make("span", { className: percent > 0 ? "worse" : "better" }, `${percent > 0 ? "+" : "−"}${Math.abs(percent)} %`);
}

/** Where a question could not be answered at all. */
function showFailure(box, error) {
  box.replaceChildren(banner("bad", "✕ No answer", ""), ...explain(error));
}
