// What became of a task that was tried by hand.

/** Admitted, bound, deadline, response, met: whatever of it the answer told. */
function outcomeList(told) {
  const rows = [
    ["Admitted", told.admitted === undefined ? undefined : told.admitted ? "yes" : "best effort"],
    ["Bound", told.bound_us === undefined || told.bound_us === null ? "none" : formatTime(told.bound_us)],
    ["Deadline", told.deadline_us === undefined ? undefined : formatTime(told.deadline_us)],
    [told.worst_response_us === undefined ? "Response" : "Worst response", formatTime(told.worst_response_us ?? told.response_us)],
    ["Met", told.met !== undefined ? (told.met ? "✓ yes" : "✕ no") : told.missed !== undefined ? (told.missed ? `✕ ${told.missed} of ${told.jobs} missed` : `✓ all ${told.jobs}`) : undefined],
  ];
  return make("dl", { className: "outcome" }, ...rows.filter(([, text]) => text !== undefined).map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))));
}

function showTop(box, told) {
  const items = told.top.map(({ label, probability }) => make("li", {},
    make("span", {}, label), make("span", { className: "right" }, `${(100 * probability).toFixed(1)} %`),
    make("progress", { max: 1, value: probability, "aria-label": `Probability of ${label}` })));
  box.replaceChildren(make("ol", { className: "tops" }, ...items), outcomeList(told));
}

function showOutputs(box, outputs, told) {
  const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(5))) : "–");
  const rows = outputs.map((output) => [output.name, `${output.datatype} [${output.shape.join(", ")}]`, number(output.min), number(output.mean), number(output.max), (output.first ?? []).map(number).join("  ")]);
  const columns = ["Output", "Type", "Least", "Mean", "Most"];
  const values = outputs.some((output) => output.first);
  box.replaceChildren(makeTable("Outputs", values ? [...columns, "First values"] : columns, rows.map((row) => (values ? row : row.slice(0, 5))), [2, 3, 4]), outcomeList(told));
}

/** Outputs of the inference protocol in few numbers. */
function summarise(outputs) {
  return outputs.map(({ name, datatype, shape, data }) => {
    const numbers = data.flat(Infinity).map(Number), count = numbers.length || 1;
    const least = numbers.reduce((a, b) => Math.min(a, b), Infinity), most = numbers.reduce((a, b) => Math.max(a, b), -Infinity);
    return { name, datatype, shape, min: least, mean: numbers.reduce((a, b) => a + b, 0) / count, max: most, first: numbers.slice(0, 6) };
  });
}

/** Text as it comes, after its prompt. */
function startText(box, prompt) {
  const text = make("span"), told = make("div");
  box.replaceChildren(make("p", { className: "text-out", "aria-live": "off" }, make("span", { className: "prompt" }, prompt), text), told);
  return { add: (more) => text.append(more), end: (outcome) => told.replaceChildren(outcomeList(outcome)) };
}

function showTrialFailure(box, error) {
  if (!(error instanceof Refusal)) {
    box.replaceChildren(banner("bad", "✕ Not sent", error.message));
    return;
  }
  const late = error.status === 504 ? "✕ Expired" : error.status === 429 || error.status === 503 ? "✕ Refused" : "✕ Failed";
  box.replaceChildren(banner("bad", late, ""), ...explain(error));
}
