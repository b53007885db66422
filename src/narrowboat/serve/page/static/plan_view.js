// The plan as blocks: which stay, which are in memory now, which one comes, which are out.

const planRows = new Map(); // name -> {row, note, painting, told}

function startPlanView() {
  run.on("plan", layOutPlan);
  run.on("tick", updatePlan);
  tableButton("plan-table", planTable);
}

function layOutPlan() {
  const plan = run.plan;
  setText(byId("plan-note"),
    `${plan.policy.toUpperCase()}, ${plan.preemption}; needs ${formatBytes(plan.needed_bytes)} of ${formatBytes(plan.budget_bytes)}: ` +
    `${formatBytes(plan.pinned_bytes)} resident, ${formatBytes(plan.pool_bytes)} for blocks that come and go`);
  planRows.forEach(({ painting }) => painting.end());
  planRows.clear();
  for (const task of plan.tasks) {
    const canvas = make("canvas", { role: "img", "aria-label": `Blocks of ${task.name}` }), note = make("span", { className: "note" });
    canvas.dataset.height = "28";
    const row = make("li", {}, make("span", { className: "name" }, makeChip(task.name), task.name), canvas, note);
    const kept = { row, note, told: "", painting: null };
    kept.painting = new Painting(canvas, (context, width, height) => drawBlocks(task, context, width, height));
    planRows.set(task.name, kept);
  }
  byId("plan").replaceChildren(...[...planRows.values()].map(({ row }) => row));
  updatePlan();
}

/** What state each block is in: "resident", "held", "coming" or "out". */
function blockStates(task) {
  const held = new Set(run.tick?.in?.[task.name] ?? []), coming = run.tick?.coming?.[task.name];
  return task.blocks.map((block, k) => (block.bytes === 0 ? "resident" : held.has(k) ? "held" : coming === k ? "coming" : "out"));
}

function updatePlan() {
  if (!run.plan) return;
  for (const task of run.plan.tasks) {
    const kept = planRows.get(task.name), now = `${run.tick?.in?.[task.name]} ${run.tick?.coming?.[task.name]}`;
    if (!kept || (kept.told === now && kept.note.textContent)) continue;
    kept.told = now;
    const states = blockStates(task), swapped = task.blocks.filter((block) => block.bytes > 0).length;
    const held = states.filter((state) => state === "held").length, coming = states.indexOf("coming");
    const all = task.blocks.reduce((sum, block) => sum + block.bytes + block.resident_bytes, 0);
    const text = swapped ? `${held} of ${swapped} in${coming >= 0 ? `, ${coming} coming` : ""}` : "all resident";
    setText(kept.note, `${text} · ${task.blocks.length} blocks, ${formatBytes(all)}`);
    setAttribute(kept.painting.canvas, "aria-label", `Blocks of ${task.name}: ${text}`);
    kept.painting.ask();
  }
}

function drawBlocks(task, context, width, height) {
  const { colours } = theme, states = blockStates(task), colour = theme.colour(task.name), count = task.blocks.length;
  const sizes = task.blocks.map((block) => block.bytes + block.resident_bytes), all = sizes.reduce((a, b) => a + b, 0) || 1;
  const least = Math.min(6, (width / count) * 0.8), rest = width - least * count;
  let left = 0;
  for (let k = 0; k < count; k++) {
    const wide = least + (sizes[k] / all) * rest, gap = wide > 4 ? 2 : 0.5, inner = Math.max(wide - gap, 0.5), state = states[k];
    const block = task.blocks[k], stays = sizes[k] ? (height * block.resident_bytes) / sizes[k] : 0;
    context.fillStyle = colours.sunk;
    context.fillRect(left, 0, inner, height);
    if (state === "held") {
      context.fillStyle = hatched(context, task.name);
      context.fillRect(left, 0, inner, height);
    } else if (state === "coming") {
      context.fillStyle = colour;
      context.fillRect(left, 0, inner * 0.35, height);
    }
    context.fillStyle = colour;
    if (state === "resident") context.fillRect(left, 0, inner, height);
    else if (stays > 0) context.fillRect(left, height - Math.max(stays, 2), inner, Math.max(stays, 2));
    if (state !== "resident" && inner > 3) {
      context.strokeStyle = state === "out" ? colours.edge : colour;
      context.lineWidth = state === "coming" ? 2 : 1;
      context.setLineDash(state === "out" ? [3, 3] : []);
      context.strokeRect(left + 0.5, 0.5, inner - 1, height - 1);
      context.setLineDash([]);
    }
    const label = String(k), size = context.measureText(label).width;
    if (size + 10 < inner) {
      context.fillStyle = state === "resident" || state === "held" ? colour : colours.sunk;
      context.fillRect(left + inner / 2 - size / 2 - 3, height / 2 - 8, size + 6, 15);
      context.fillStyle = state === "resident" || state === "held" ? colours["on-strong"] : colours.faint;
      context.textBaseline = "middle";
      context.fillText(label, left + inner / 2 - size / 2, height / 2);
    }
    left += wide;
  }
}

/** Always a pattern, whatever the task's own is: here it says "in memory", not whose. */
function hatched(context, name) {
  return theme.pattern(context, `t${theme.number(name) % 8}`, 1);
}

function planTable() {
  if (!run.plan) return make("p", { className: "note" }, "There is no plan yet.");
  const rows = run.plan.tasks.map((task) => {
    const states = blockStates(task), which = (state) => states.flatMap((each, k) => (each === state ? [k] : [])).join(" ") || "–";
    return [task.name, which("resident"), which("held"), which("coming"), which("out"), formatTime(task.cost_us), formatShare(task.utilisation), formatBytes(task.pinned_bytes)];
  });
  return makeTable("Blocks of each task by number", ["Task", "Resident", "In memory now", "Coming", "Out", "Cost of a job", "Utilisation", "Stays in memory"], rows, [5, 6, 7]);
}
