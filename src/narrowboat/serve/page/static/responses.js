// Each task's last responses against its bound and its deadline.

const responseRows = new Map(); // name -> {row, cells, painting}

function startResponses() {
  run.on("plan", layOutResponses);
  run.on("tick", updateResponses);
}

function layOutResponses() {
  const body = document.querySelector("#responses tbody"), tasks = run.plan.tasks;
  for (const [name, kept] of responseRows) {
    if (tasks.some((task) => task.name === name)) continue;
    kept.painting.end();
    responseRows.delete(name);
  }
  for (const task of tasks) {
    if (responseRows.has(task.name)) continue;
    const canvas = make("canvas", { role: "img", "aria-label": `Responses of ${task.name}` }), cells = { kind: make("small"), canvas };
    canvas.dataset.height = "46";
    for (const name of ["ratio", "done", "missed"]) cells[name] = make("td", { className: "right" });
    const row = make("tr", {},
      make("th", { scope: "row" }, make("span", { className: "name" }, makeChip(task.name), task.name), cells.kind), make("td", {}, canvas), cells.ratio, cells.done, cells.missed);
    const painting = new Painting(canvas, (context, width, height) => drawResponses(task.name, context, width, height), 250);
    responseRows.set(task.name, { row, cells, painting });
  }
  body.replaceChildren(...tasks.map((task) => responseRows.get(task.name).row));
  updateResponses();
}

const planned = (name) => run.plan?.tasks.find((task) => task.name === name);

function updateResponses() {
  for (const [name, { cells, painting }] of responseRows) {
    const task = planned(name), told = run.tick?.tasks?.[name] ?? {}, kept = run.task(name), bound = task.response_bound_us;
    setText(cells.kind, task.guarantee === "guaranteed" ? `deadline ${formatTime(task.deadline_us)}` : "best effort");
    const ratio = bound ? kept.worst / bound : NaN;
    setParts(cells.ratio, Number.isFinite(ratio) && kept.worst ? ratio.toFixed(2) : "–", kept.worst ? bound ? `${formatTime(kept.worst)} of ${formatTime(bound)}` : `worst ${formatTime(kept.worst)}` : "none yet");
    setText(cells.done, formatCount(told.done ?? 0));
    const causes = [...kept.causes].map(([outcome, { count }]) => `${formatCount(count)} ${outcome}`).join(", ");
    const seen = [...kept.causes.values()].reduce((sum, { count }) => sum + count, 0), all = told.missed ?? 0;
    setParts(cells.missed, formatCount(all), causes && seen < all ? `lately ${causes}` : causes);
    cells.missed.classList.toggle("missed", all > 0);
    cells.missed.title = [...kept.causes.values()].map(({ last }) => last).filter(Boolean).join("\n");
    painting.ask();
  }
}

/** A figure and a small line under it. */
function setParts(cell, figure, small) {
  if (cell.children.length === 0) cell.append(make("span"), make("small"));
  setText(cell.firstChild, figure);
  setText(cell.lastChild, small);
}

function drawResponses(name, context, width, height) {
  const { colours } = theme, task = planned(name), { responses, worst } = run.task(name);
  if (!task) return;
  const { deadline_us: deadline, response_bound_us: bound } = task, floor = height - 13;
  const most = Math.max(deadline, bound ?? 0, Math.min(worst, 1.5 * deadline)) * 1.06 || 1, x = (time) => 4 + (Math.min(time, most) / most) * (width - 10);
  context.fillStyle = colours.sunk;
  context.fillRect(4, 2, x(deadline) - 4, floor - 2);
  context.fillStyle = theme.colour(name);
  context.globalAlpha = 0.55;
  const count = Math.min(responses.size, 120);
  for (let k = count - 1; k >= 0; k--) {
    const at = responses.at(k), y = floor - 4 - (k / Math.max(count - 1, 24)) * (floor - 9);
    if (responses.outcome[at] === 0) {
      context.beginPath();
      context.arc(x(responses.response[at]), y, 2.2, 0, 7);
      context.fill();
    } else {
      context.globalAlpha = 1;
      cross(context, x(responses.response[at]), y, 3, colours.bad);
      context.globalAlpha = 0.55;
    }
  }
  context.globalAlpha = 1;
  if (bound !== null) {
    context.fillStyle = colours.text;
    context.fillRect(x(bound) - 1.5, 0, 3, floor + 2);
  }
  context.fillStyle = colours.bad;
  context.fillRect(x(deadline) - 1, 0, 2, floor + 2);
  context.fillRect(x(deadline) + 2, 0, 1, floor + 2);
  context.font = FONT.replace("12px", "11px");
  context.textBaseline = "alphabetic";
  if (bound !== null) {
    const label = formatTime(bound), ends = formatTime(deadline), gap = x(deadline) - context.measureText(ends).width - 8;
    context.fillStyle = colours.faint;
    writeInside(context, ends, x(deadline) + 3, height - 1, 0, width, "right");
    context.fillStyle = colours.text;
    if (x(bound) - context.measureText(label).width / 2 < gap - context.measureText(label).width) writeInside(context, label, x(bound), height - 1, 0, gap);
  } else {
    context.fillStyle = colours.faint;
    writeInside(context, formatTime(deadline), x(deadline) + 3, height - 1, 0, width, "right");
  }
  const said = `Responses of ${name}: worst ${formatTime(worst)}, bound ${bound === null ? "none" : formatTime(bound)}, deadline ${formatTime(deadline)}`;
  setAttribute(context.canvas, "aria-label", said);
}
