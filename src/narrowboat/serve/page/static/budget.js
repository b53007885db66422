// The budget: what another would do, asked while the slider moves; changed only when that is applied and confirmed.

const budget = { bytes: 0, touched: false, asked: 0, low: 0, high: 0 };

function startBudget() {
  const slider = byId("budget-slider"), number = byId("budget-number"), unit = byId("budget-unit");
  slider.addEventListener("input", () => chooseBudget(Number(slider.value), "slider"));
  number.addEventListener("input", () => chooseBudget(Math.round(Number(number.value) * UNITS[unit.value]), "number"));
  unit.addEventListener("change", () => showBudget("unit"));
  byId("budget-reset").addEventListener("click", resetBudget);
  byId("budget-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!byId("budget-apply").disabled) applyBudget();
  });
  run.on("plan", () => {
    setRange();
    if (!budget.touched) resetBudget();
    else previewBudget();
  });
}

/** From what could never be enough to where more would change nothing. */
function setRange() {
  const plan = run.plan, slider = byId("budget-slider"), step = 2 ** 20;
  const whole = plan.tasks.reduce((sum, task) => sum + task.blocks.reduce((all, block) => all + block.bytes + block.resident_bytes, 0), 0);
  budget.low = Math.max(step, Math.floor((plan.needed_bytes * 0.4) / step) * step);
  budget.high = Math.ceil(Math.max(plan.budget_bytes * 1.25, whole * 1.25, plan.needed_bytes * 1.5) / step) * step;
  Object.assign(slider, { min: budget.low, max: budget.high, step: budget.high - budget.low > 400 * step ? step : step / 4, disabled: false });
  byId("budget-number").disabled = false;
  const [low, high] = byId("budget-range").children;
  setText(low, formatBytes(budget.low));
  setText(high, formatBytes(budget.high));
}

function resetBudget() {
  budget.bytes = run.plan.budget_bytes;
  budget.touched = false;
  budget.asked += 1; // an answer that is under way is no longer wanted
  showBudget();
  setApplicable(false);
  byId("budget-preview").replaceChildren(banner("", "Now", `${formatBytes(run.plan.budget_bytes)}. Move the slider to see what another budget would do.`), boundsTable(run.plan, true, "budget-preview"));
}

function chooseBudget(bytes, from) {
  budget.bytes = bytes;
  budget.touched = true;
  showBudget(from);
  setApplicable(false);
  previewBudget();
}

/** Both controls say the same; the one that is being used is left alone. */
function showBudget(from = "") {
  const slider = byId("budget-slider"), number = byId("budget-number"), known = Number.isFinite(budget.bytes) && budget.bytes >= 1;
  setAttribute(number, "aria-invalid", String(!known));
  if (!known) return;
  if (from !== "slider") slider.value = Math.min(Math.max(budget.bytes, budget.low), budget.high);
  if (from !== "number") number.value = String(Number((budget.bytes / UNITS[byId("budget-unit").value]).toFixed(2)));
  setAttribute(slider, "aria-valuetext", formatBytes(budget.bytes));
}

function setApplicable(can) {
  byId("budget-apply").disabled = !can;
  byId("budget-reset").disabled = !budget.touched;
}

const previewBudget = debounce(250, async () => {
  if (!budget.touched || !(budget.bytes >= 1)) return;
  const box = byId("budget-preview"), bytes = budget.bytes, mine = ++budget.asked;
  try {
    const answer = await api.json("POST", "/v1/admission", { budget: bytes });
    if (mine !== budget.asked) return; // the slider has moved on
    showVerdict(box, answer, bytes === run.plan.budget_bytes ? `${formatBytes(bytes)}, as it is now` : `${formatBytes(bytes)} instead of ${formatBytes(run.plan.budget_bytes)}`, (found) => chooseBudget(found));
    budget.answer = answer;
    setApplicable(answer.admitted && bytes !== run.plan.budget_bytes);
  } catch (error) {
    if (mine === budget.asked) showFailure(box, error);
  }
});

async function applyBudget() {
  const bytes = budget.bytes, before = run.plan.budget_bytes, told = byId("budget-told"), { change, plan } = budget.answer;
  const worse = plan.tasks.filter((task) => task.response_bound_us > (planned(task.name)?.response_bound_us ?? Infinity)).map(({ name }) => name);
  const text = [`All tasks then share ${formatBytes(bytes)} instead of ${formatBytes(before)}.`];
  if (change) text.push(`They pause for up to ${formatTime(change.pause_us)} while blocks are laid out anew; their deadlines can bear ${formatTime(change.allowed_us)}.`);
  text.push(worse.length ? `Bounds get longer, and still hold their deadlines: ${worse.join(", ")}.` : "No bound gets longer.");
  if (!(await confirmChange("Change the budget?", `Change to ${formatBytes(bytes)}`, ...text))) return;
  setApplicable(false);
  tell(told, "", "Changing …");
  try {
    const inForce = await api.json("PUT", "/v1/budget", { budget: bytes });
    budget.touched = false;
    run.setPlan(inForce.tasks ? inForce : await api.json("GET", "/v1/plan"));
    tell(told, "good", `✓ The budget is ${formatBytes(run.plan.budget_bytes)} now; it was ${formatBytes(before)}.`);
  } catch (error) {
    tell(told, "bad", make("b", {}, "✕ Not changed. "), ...explain(error));
    setApplicable(true);
  }
}
