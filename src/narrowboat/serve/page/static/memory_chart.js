// Memory in the last minute: what stays, what comes and goes, and the rest, stacked under the budget.

const SPAN = 60; // seconds
const POOLS = [["resident", "resident"], ["swap", "swapped in"], ["other", "other"]];

function startMemoryChart() {
  const painting = new Painting(byId("memory-chart"), drawMemory, 250), legend = byId("memory-legend");
  const values = {};
  for (const [pool, name] of POOLS) {
    values[pool] = make("b");
    legend.append(make("span", {}, make("i", { className: `mark pool-${pool}` }), `${name} `, values[pool]));
  }
  values.peak = make("b");
  legend.append(make("span", {}, make("i", { className: "mark line-peak" }), "peak ", values.peak));
  run.on("tick", () => {
    painting.ask();
    const { pools = {}, peak_bytes: peak } = run.tick || {};
    for (const [pool] of POOLS) setText(values[pool], formatBytes(pools[pool] ?? NaN));
    setText(values.peak, formatBytes(peak ?? NaN));
  });
  tableButton("memory-table", memoryTable);
}

/** The largest of the shown span: what is held, the budget, the peak. */
function memoryTop() {
  const ring = run.memory, now = run.tick?.time ?? 0;
  let [held, budget, peak] = [0, 0, 0];
  for (let k = 0; k < ring.size; k++) {
    const at = ring.at(k);
    if (ring.time[at] < now - SPAN) break;
    held = Math.max(held, ring.resident[at] + ring.swap[at] + ring.other[at]);
    budget = Math.max(budget, ring.budget[at]);
    peak = Math.max(peak, ring.peak[at]);
  }
  return { held, budget, peak, top: Math.max(held, budget, peak, 1) * 1.12 };
}

function drawMemory(context, width, height) {
  const { colours } = theme, ring = run.memory, left = 62, right = width - 8, floor = height - 22, head = 8;
  const { held, top } = memoryTop(), now = run.tick?.time ?? 0;
  const x = (time) => right - ((now - time) / SPAN) * (right - left), y = (bytes) => floor - (bytes / top) * (floor - head);

  context.fillStyle = colours.faint;
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  const step = niceStep(top, 5, true);
  for (let bytes = 0; bytes <= top; bytes += step) {
    const at = Math.round(y(bytes)) + 0.5;
    context.beginPath();
    context.moveTo(left, at);
    context.lineTo(right, at);
    context.stroke();
    writeInside(context, formatBytes(bytes), left - 8, at, 0, left - 8, "right");
  }
  context.textBaseline = "alphabetic";
  const every = right - left < 420 ? 20 : 10;
  for (let back = 0; back <= SPAN; back += every) {
    writeInside(context, back ? `−${back} s` : "now", x(now - back), height - 5, left - 12, right, "center");
  }
  if (!ring.size) return;

  const shown = [];
  for (let k = 0; k < ring.size; k++) {
    const at = ring.at(k);
    shown.push(at);
    if (ring.time[at] < now - SPAN) break;
  }
  shown.reverse();
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, floor + 1);
  context.clip();
  const fills = [colours.resident, theme.pattern(context, "swap", 1), theme.pattern(context, "other", 2)];
  for (const part of pieces(ring, shown)) {
    const below = new Float64Array(part.length);
    POOLS.forEach(([pool], k) => {
      context.beginPath();
      part.forEach((at, n) => context.lineTo(x(ring.time[at]), y(below[n])));
      for (let n = part.length - 1; n >= 0; n--) {
        below[n] += ring[pool][part[n]];
        context.lineTo(x(ring.time[part[n]]), y(below[n]));
      }
      context.fillStyle = fills[k];
      context.fill();
    });
    stroke(context, part, (at) => x(ring.time[at]), (at) => y(ring.peak[at]), colours.text, [2, 3], 1.5);
    stroke(context, part, (at) => x(ring.time[at]), (at) => y(ring.budget[at]), colours.bad, [7, 4], 2);
  }
  context.restore();
  const last = shown.at(-1), label = `budget ${formatBytes(ring.budget[last])}`, level = y(ring.budget[last]);
  context.fillStyle = colours.panel;
  const wide = context.measureText(label).width;
  context.fillRect(left + 6, level - 20, wide + 8, 16);
  context.fillStyle = colours.bad;
  context.fillText(label, left + 10, level - 7);
  setAttribute(byId("memory-chart"), "aria-label",
    `Memory held in the last ${SPAN} seconds: ${formatBytes(held)} at most, of a budget of ${formatBytes(ring.budget[last])}`);
}

/** Stretches without a gap: where nothing was heard, nothing is drawn. */
function pieces(ring, shown) {
  const found = [];
  let part = [];
  for (const at of shown) {
    if (part.length && ring.time[at] - ring.time[part.at(-1)] > 2) {
      found.push(part);
      part = [];
    }
    part.push(at);
  }
  return [...found, part];
}

function stroke(context, points, x, y, colour, dash, width) {
  context.beginPath();
  points.forEach((at) => context.lineTo(x(at), y(at)));
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.setLineDash(dash);
  context.stroke();
  context.setLineDash([]);
}

function memoryTable() {
  const ring = run.memory, now = run.tick?.time ?? 0, rows = [];
  for (let from = 0; from < SPAN; from += 10) {
    const most = { resident: 0, swap: 0, other: 0, held: 0, budget: NaN };
    for (let k = 0; k < ring.size; k++) {
      const at = ring.at(k), back = now - ring.time[at];
      if (back < from || back >= from + 10) continue;
      for (const [pool] of POOLS) most[pool] = Math.max(most[pool], ring[pool][at]);
      most.held = Math.max(most.held, ring.resident[at] + ring.swap[at] + ring.other[at]);
      most.budget = ring.budget[at];
    }
    if (Number.isFinite(most.budget)) {
      rows.push([`${from} to ${from + 10} s ago`, ...["resident", "swap", "other", "held", "budget"].map((name) => formatBytes(most[name]))]);
    }
  }
  return makeTable("Most memory in ten seconds each", ["When", "Resident", "Swapped in", "Other", "Held", "Budget"], rows, [1, 2, 3, 4, 5]);
}
