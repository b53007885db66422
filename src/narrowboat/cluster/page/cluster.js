// The plan of the whole cluster, asked for again and again.

const EVERY = 1000; // milliseconds
const STATES = { ready: "good", joining: "wait", silent: "warn", lost: "bad", refused: "bad" };
let promised = "";

const pillOf = (kind, text) => make("span", { className: "pill", "data-is": kind }, text);

function nodeRow(node) {
  const state = make("span", {}, pillOf(STATES[node.state] ?? "wait", node.state), node.said ? ` ${node.said}` : "");
  return [
    node.name,
    state,
    `${formatBytes(node.held_bytes)} of ${formatBytes(node.budget_bytes)}`,
    `${Math.round(node.utilisation * 100)} %`,
    formatTime(node.longest_way_us),
    node.tasks.join(", ") || "none",
  ];
}

function taskRow(task) {
  const refused = Object.entries(task.refused).map(([node, why]) => (node ? `${node}: ${why}` : why));
  const where = task.nodes.length ? task.nodes.join(", ") : make("span", {}, pillOf("bad", "nowhere"), ` ${refused.join("; ") || task.reason}`);
  return [
    task.name,
    task.guarantee,
    where,
    task.guarantee === "guaranteed" ? formatTime(task.response_bound_us) : "none",
    formatTime(task.deadline_us),
    String(task.under_way),
  ];
}

const clockTime = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

function show(plan) {
  const { ingress, nodes, tasks } = plan;
  byId("node-table").replaceChildren(makeTable("Nodes", ["Node", "State", "Memory", "Promised time", "Longest way", "Tasks"], nodes.map(nodeRow), [3, 4]));
  byId("task-table").replaceChildren(makeTable("Tasks", ["Task", "Guarantee", "On", "Bound", "Deadline", "Under way"], tasks.map(taskRow), [3, 4, 5]));
  byId("history").replaceChildren(makeTable("What happened", ["When", "What"], plan.happened.toReversed().map(({ time, said }) => [clockTime(time), said])));
  setText(byId("nodes-note"), `${nodes.filter(({ state }) => state === "ready").length} of ${nodes.length} ready; ${formatBytes(plan.budget_bytes)} together`);
  setText(byId("ingress"), `${formatTime(ingress.longest_us)} of ${formatTime(ingress.allowed_us)} allowed; ${ingress.exceeded} over`);
  const homeless = tasks.filter(({ guarantee, nodes: on }) => guarantee === "guaranteed" && !on.length);
  const said = homeless.length ? `without a node: ${homeless.map(({ name }) => name).join(", ")}` : ingress.exceeded ? "ways took longer than is promised" : "kept by their nodes";
  const pill = byId("promises");
  setText(pill, said);
  setAttribute(pill, "data-is", homeless.length ? "bad" : ingress.exceeded ? "warn" : "good");
  if (said !== promised) setText(byId("announce"), `Promises: ${said}`);
  promised = said;
}

async function follow() {
  for (;;) {
    try {
      show(await api.json("GET", "/v1/plan"));
    } catch (error) {
      const pill = byId("promises");
      setText(pill, error instanceof Refusal ? error.message : "the ingress cannot be reached");
      setAttribute(pill, "data-is", "bad");
    }
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5 * EVERY : EVERY));
  }
}

theme.start();
api.start();
follow();
