// What both engines did in the last seconds, and under them each task's jobs with their deadlines.

const SPANS = [0.25, 0.5, 1, 2, 5, 10, 20, 30]; // seconds
const LANES = [["compute", 1], ["load", 0]];
const LANE = 34, ROW = 16, HEAD = 6, FOOT = 22;

const gantt = { span: 5, paused: false, end: 0, painting: null, hits: [], pointed: "", chosen: false };

function startGantt() {
  const canvas = byId("gantt-chart");
  gantt.painting = new Painting(canvas, drawGantt);
  byId("gantt-pause").addEventListener("click", () => pauseGantt(!gantt.paused));
  byId("gantt-in").addEventListener("click", () => zoomGantt(-1));
  byId("gantt-out").addEventListener("click", () => zoomGantt(1));
  byId("gantt-earlier").addEventListener("click", () => moveGantt(-0.5));
  byId("gantt-later").addEventListener("click", () => moveGantt(0.5));
  canvas.addEventListener("pointermove", (event) => pointAt(event.offsetX, event.offsetY));
  canvas.addEventListener("pointerleave", () => pointAt(-1, -1));
  run.on("plan", layOutGantt);
  run.on("plan", chooseSpan);
  run.on("tick", () => gantt.paused || gantt.painting.ask());
  tableButton("gantt-table", ganttTable);
  layOutGantt();
}

const ganttTasks = () => (run.plan?.tasks ?? []).slice(0, 16).map((task) => task.name);
const ganttEnd = () => (gantt.paused ? gantt.end : run.tick?.now_us ?? 0);

function layOutGantt() {
  const tasks = ganttTasks();
  gantt.painting.height = HEAD + LANES.length * (LANE + 4) + (tasks.length ? 8 + tasks.length * ROW : 0) + FOOT;
  byId("gantt-key").replaceChildren(
    ...tasks.map((name) => make("span", {}, makeChip(name), name)),
    make("span", {}, "thin bars: jobs from release to finish"), make("span", {}, make("i", { className: "mark deadline" }), "deadline"),
    make("span", {}, make("i", { className: "mark cross" }), "missed"));
  gantt.painting.ask(true);
}

function pauseGantt(paused) {
  gantt.paused = paused;
  gantt.end = run.tick?.now_us ?? 0;
  byId("gantt-pause").setAttribute("aria-pressed", String(paused));
  byId("gantt-earlier").disabled = byId("gantt-later").disabled = !paused;
  gantt.painting.ask(true);
}

function zoomGantt(by) {
  const at = Math.min(Math.max(SPANS.indexOf(gantt.span) + by, 0), SPANS.length - 1);
  gantt.span = SPANS[at];
  byId("gantt-in").disabled = at === 0;
  byId("gantt-out").disabled = at === SPANS.length - 1;
  setText(byId("gantt-span"), formatTime(gantt.span * 1e6));
  gantt.painting.ask(true);
}

/** At first so much that a task of middling period is seen some times. */
function chooseSpan() {
  if (gantt.chosen || !run.plan.tasks.length) return;
  gantt.chosen = true;
  const periods = run.plan.tasks.map((task) => task.period_us).sort((a, b) => a - b), middle = periods[periods.length >> 1] / 1e6;
  gantt.span = SPANS.find((span) => span >= 4 * middle) ?? SPANS.at(-1);
  zoomGantt(0);
}

/** While it is paused: by so many times what is shown, within what is kept. */
function moveGantt(by) {
  const ring = run.segments, newest = run.tick?.now_us ?? 0;
  const oldest = ring.size ? ring.begin[ring.at(ring.size - 1)] : newest;
  gantt.end = Math.max(Math.min(gantt.end + by * gantt.span * 1e6, newest), Math.min(oldest + gantt.span * 1e6, newest));
  gantt.painting.ask(true);
}

function drawGantt(context, width, height) {
  const { colours } = theme, left = 62, right = width - 8, end = ganttEnd(), begin = end - gantt.span * 1e6;
  const x = (time) => left + ((time - begin) / (end - begin)) * (right - left), tasks = ganttTasks();
  context.textBaseline = "middle";
  LANES.forEach(([name], k) => {
    const top = HEAD + k * (LANE + 4);
    context.fillStyle = colours.sunk;
    context.fillRect(left, top, right - left, LANE);
    context.fillStyle = colours.faint;
    context.fillText(name, 0, top + LANE / 2);
  });
  drawTimes(context, x, begin, end, left, right, height);
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, height - FOOT);
  context.clip();
  drawSegments(context, x, begin, left);
  drawJobs(context, x, begin, end, tasks);
  context.restore();
  readOut();
  const rows = HEAD + LANES.length * (LANE + 4) + 8;
  context.fillStyle = colours.faint;
  if (tasks.length) context.fillText("jobs", 0, rows + (tasks.length * ROW) / 2);
  setAttribute(byId("gantt-chart"), "aria-label", `What both engines did in ${formatTime(gantt.span * 1e6)}: compute and load, and the jobs of ${tasks.length} tasks`);
}

function drawTimes(context, x, begin, end, left, right, height) {
  const { colours } = theme, step = niceStep((end - begin) / 1e6, (right - left) / 90) * 1e6;
  const digits = Math.max(0, -Math.floor(Math.log10(step / 1e6) + 1e-9));
  context.strokeStyle = colours.line;
  context.fillStyle = colours.faint;
  context.lineWidth = 1;
  for (let time = Math.ceil(Math.max(begin, 0) / step) * step; time <= end; time += step) {
    const at = Math.round(x(time)) + 0.5;
    context.beginPath();
    context.moveTo(at, HEAD);
    context.lineTo(at, height - FOOT + 2);
    context.stroke();
    writeInside(context, `${(time / 1e6).toFixed(digits)} s`, at, height - 9, left - 14, right + 8);
  }
}

/** From the newest back; what would fall on a pixel that has been drawn is left out, and patterns where they cannot be seen. */
function drawSegments(context, x, begin, left) {
  const ring = run.segments, drawn = [Infinity, Infinity], fills = new Map();
  gantt.hits = [];
  for (let k = 0; k < ring.size; k++) {
    const at = ring.at(k);
    if (ring.end[at] < begin) break;
    const engine = ring.engine[at], task = ring.task[at], from = x(ring.begin[at]), to = x(ring.end[at]);
    const start = Math.max(from, left);
    if (drawn[engine] - start < 0.7) continue;
    drawn[engine] = start;
    const name = run.names[task], top = HEAD + (engine ? 0 : LANE + 4), wide = Math.max(to - start, 1);
    if (!fills.has(task)) fills.set(task, theme.fill(context, name));
    context.fillStyle = wide < 3 ? theme.colour(name) : fills.get(task);
    context.fillRect(start, top + 2, wide - (wide > 4 ? 1 : 0), LANE - 4);
    if (gantt.hits.length < 4000) gantt.hits.push({ start, to, top, at });
    if (wide > 26) labelSegment(context, start, wide, top, name, ring.block[at]);
  }
}

function labelSegment(context, start, wide, top, name, block) {
  const number = block >= 0 ? ` ${block}` : "", full = `${name}${number}`;
  let text = full;
  if (context.measureText(full).width + 14 > wide) text = number.trim();
  const size = context.measureText(text).width;
  if (!text || size + 8 > wide) return;
  context.fillStyle = theme.colour(name);
  context.fillRect(start + 3, top + LANE / 2 - 8, size + 6, 16);
  context.fillStyle = theme.colours["on-strong"];
  context.fillText(text, start + 6, top + LANE / 2 + 0.5);
}

function drawJobs(context, x, begin, end, tasks) {
  const { colours } = theme, ring = run.jobs, top = HEAD + LANES.length * (LANE + 4) + 8;
  const rows = new Map(tasks.map((name, k) => [run.names.indexOf(name), top + k * ROW]));
  for (let k = 0; k < ring.size; k++) {
    const at = ring.at(k), row = rows.get(ring.task[at]), finish = Number.isNaN(ring.finish[at]) ? ring.release[at] : ring.finish[at];
    if (row === undefined || Math.max(finish, ring.due[at]) < begin || ring.release[at] > end) continue;
    const missed = ring.outcome[at] !== 0, from = x(ring.release[at]), to = Math.max(x(finish), from + 1), due = x(ring.due[at]);
    context.fillStyle = missed ? colours.bad : theme.colour(run.names[ring.task[at]]);
    context.fillRect(from, row + ROW / 2 - 2, to - from, 5);
    context.fillRect(from, row + 2, 1.5, ROW - 4);
    context.fillStyle = colours.bad;
    context.fillRect(due - 1, row + 3, 2, ROW - 6);
    context.fillRect(due + 2, row + 3, 1, ROW - 6);
    if (missed) cross(context, to, row + ROW / 2, 4, colours.bad);
  }
}

function cross(context, x, y, size, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x - size, y - size);
  context.lineTo(x + size, y + size);
  context.moveTo(x + size, y - size);
  context.lineTo(x - size, y + size);
  context.stroke();
}

function sayWhat(at) {
  const ring = run.segments, block = ring.block[at], job = ring.job[at];
  const size = ring.bytes[at] > 0 ? `, ${formatBytes(ring.bytes[at])}` : "";
  return `${run.names[ring.task[at]]}${job >= 0 ? ` #${job}` : ""}: ${DOINGS[ring.what[at]].replace("_", " ")}${block >= 0 ? ` block ${block}` : ""}, ${formatTime(ring.end[at] - ring.begin[at])}${size}`;
}

function pointAt(x, y) {
  const hit = gantt.hits.find(({ start, to, top }) => x >= start - 1 && x <= to + 1 && y >= top && y <= top + LANE);
  gantt.pointed = hit ? sayWhat(hit.at) : "";
  readOut();
}

/** What is pointed at; where more happened than was listed, the chart says that it is not whole. */
function readOut() {
  const lost = run.lostAt >= 0 && run.lostAt > ganttEnd() - gantt.span * 1e6;
  setText(byId("gantt-readout"), gantt.pointed || (lost ? "More happened than could be listed: some bars are missing." : "Point at a bar for its figures."));
}

function ganttTable() {
  const ring = run.segments, end = ganttEnd(), rows = [];
  for (let k = 0; k < ring.size && rows.length < 40; k++) {
    const at = ring.at(k);
    if (ring.begin[at] > end) continue;
    rows.push([`${(ring.begin[at] / 1e6).toFixed(3)} s`, ring.engine[at] ? "compute" : "load", DOINGS[ring.what[at]].replace("_", " "), run.names[ring.task[at]],
      ring.job[at] >= 0 ? String(ring.job[at]) : "–", String(ring.block[at]), formatTime(ring.end[at] - ring.begin[at])]);
  }
  return makeTable("What the engines did, the newest first", ["Began", "Engine", "What", "Task", "Job", "Block", "Took"], rows, [4, 5, 6]);
}
