// One more task, described by its blocks or by a model that is known here: would it be admitted?

function startWhatIf() {
  addBlock(5, 10, 20);
  addBlock(5, 10, 20);
  byId("add-block").addEventListener("click", () => addBlock(5, 10, 20).querySelector("input").focus());
  byId("what-if-form").addEventListener("change", (event) => {
    if (event.target.name !== "kind") return;
    byId("new-blocks").hidden = event.target.value !== "blocks";
    byId("new-model").hidden = event.target.value !== "model";
  });
  byId("what-if-form").addEventListener("submit", (event) => {
    event.preventDefault();
    askWhatIf();
  });
  run.on("faces", listModels);
}

function listModels() {
  const select = byId("new-model-name"), chosen = select.value, models = [...new Set(run.faces.map((face) => face.model).filter(Boolean))].sort();
  select.replaceChildren(...models.map((model) => make("option", { value: model }, model)));
  if (models.includes(chosen)) select.value = chosen;
}

const blockRows = () => [...document.querySelectorAll("#new-blocks tbody tr")];

function addBlock(load, compute, size) {
  const cell = (name, value) => make("td", {}, make("input", { type: "number", min: "0", step: "any", value: String(value), inputMode: "decimal", name }));
  const remove = make("button", { type: "button", className: "quiet" }, "×");
  const row = make("tr", {}, make("td", {}), cell("load", load), cell("compute", compute), cell("bytes", size), make("td", {}, remove));
  remove.addEventListener("click", () => {
    if (blockRows().length === 1) return;
    row.remove();
    numberBlocks();
    byId("add-block").focus();
  });
  document.querySelector("#new-blocks tbody").append(row);
  numberBlocks();
  return row;
}

function numberBlocks() {
  const rows = blockRows();
  rows.forEach((row, k) => {
    setText(row.cells[0], String(k));
    for (const [at, name] of [[1, "Load in ms"], [2, "Compute in ms"], [3, "Size in MiB"]]) setAttribute(row.cells[at].firstChild, "aria-label", `${name} of block ${k}`);
    setAttribute(row.cells[4].firstChild, "aria-label", `Remove block ${k}`);
    row.cells[4].firstChild.disabled = rows.length === 1;
  });
}

/** The task as tasks.yaml would describe it. Throws an error that names the field. */
function describeTask() {
  const wrong = (field, text) => {
    field.setAttribute("aria-invalid", "true");
    field.focus();
    throw new RangeError(text);
  };
  document.querySelectorAll("#what-if-form [aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
  const number = (field, name, positive) => {
    const value = Number(field.value);
    if (field.value === "" || !Number.isFinite(value) || value < 0 || (positive && value === 0)) wrong(field, `${name} has to be a number${positive ? " above 0" : ", 0 or more"}.`);
    return value;
  };
  const name = byId("new-name").value.trim();
  if (!name) wrong(byId("new-name"), "The task needs a name.");
  const task = { name, period: `${number(byId("new-period"), "The period", true)}ms`, guarantee: byId("new-guarantee").value };
  if (byId("new-deadline").value) task.deadline = `${number(byId("new-deadline"), "The deadline", true)}ms`;
  if (byId("what-if-form").elements.kind.value === "model") return { ...task, model: byId("new-model-name").value };
  task.blocks = blockRows().map((row, k) => {
    const [load, compute, size] = [...row.querySelectorAll("input")];
    const block = { load: `${number(load, `Load of block ${k}`)}ms`, compute: `${number(compute, `Compute of block ${k}`)}ms` };
    const bytes = Math.round(number(size, `Size of block ${k}`) * UNITS.MiB);
    return bytes ? { ...block, bytes } : block;
  });
  return task;
}

async function askWhatIf() {
  const box = byId("what-if-answer"), button = byId("what-if-ask");
  try {
    const task = describeTask();
    button.disabled = true;
    const answer = await api.json("POST", "/v1/admission", { add: [task] });
    showVerdict(box, answer, `With ${task.name} beside the others`);
  } catch (error) {
    if (error instanceof RangeError) box.replaceChildren(banner("bad", "✕ Not asked", error.message));
    else showFailure(box, error);
  } finally {
    button.disabled = false;
  }
}
