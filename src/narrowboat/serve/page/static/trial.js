// A task tried by hand: with an image, a prompt, or tensors as JSON.

const trial = { file: null, shown: "", busy: false };

function startTrial() {
  byId("trial-task").addEventListener("change", showTrialKind);
  byId("trial-file").addEventListener("change", (event) => takeImage(event.target.files[0]));
  const drop = byId("trial-drop");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") takeImage(event.dataTransfer.files[0]);
    });
  }
  byId("trial-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tryTask();
  });
  run.on("faces", listTrialTasks);
}

function listTrialTasks() {
  const select = byId("trial-task"), chosen = select.value, faces = run.faces.filter((face) => face.ready && face.takes_requests);
  const names = faces.map((face) => face.name), known = [...select.options].map((option) => option.value);
  if (names.join("\n") !== known.join("\n")) {
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    select.value = names.includes(chosen) ? chosen : (faces.find((face) => face.takes !== "tensors") ?? faces[0])?.name ?? "";
  }
  byId("trial-go").disabled = !faces.length || trial.busy;
  if (!faces.length) setText(byId("trial-note"), "No task that runs takes requests.");
  if (select.value !== trial.shown) showTrialKind();
}

const trialFace = () => run.faces.find((face) => face.name === byId("trial-task").value);

function showTrialKind() {
  const face = trialFace();
  trial.shown = byId("trial-task").value;
  for (const [id, kinds] of [["trial-image", ["image"]], ["trial-text", ["text", "embedding"]], ["trial-tensors", ["tensors"]]]) byId(id).hidden = !kinds.includes(face?.takes);
  if (!face) return;
  const shapes = face.inputs.map(({ name, datatype, shape }) => `${name} ${datatype} [${shape.join(", ")}]`).join(", ");
  setText(byId("trial-note"), `${face.model}${shapes ? `, takes ${shapes}` : ""}`);
  byId("trial-tokens").parentElement.hidden = face.takes !== "text";
  if (face.takes === "tensors") byId("trial-json").value = `{"inputs": [\n${face.inputs.map((spec) => `  ${JSON.stringify({ ...spec, data: "random" })}`).join(",\n")}\n]}`;
}

function takeImage(file) {
  if (!file) return;
  const picture = byId("trial-picture");
  if (trial.file) URL.revokeObjectURL(picture.src);
  trial.file = file;
  picture.src = URL.createObjectURL(file);
  picture.alt = `The image to try: ${file.name}`;
  picture.hidden = false;
  setText(byId("trial-file-label"), `${file.name}, ${formatBytes(file.size)}. Choose another, or drop one here`);
}

async function tryTask() {
  const face = trialFace(), box = byId("trial-result"), button = byId("trial-go");
  if (!face || trial.busy) return;
  trial.busy = button.disabled = true;
  try {
    await { image: tryImage, text: tryText, embedding: tryEmbedding, tensors: tryTensors }[face.takes](face, box);
  } catch (error) {
    showTrialFailure(box, error);
  }
  trial.busy = button.disabled = false;
}

async function tryImage(face, box) {
  if (!trial.file) {
    byId("trial-file").focus();
    throw new Error("Choose an image first.");
  }
  const answer = await api.fetch(`/v1/tasks/${encodeURIComponent(face.name)}/try`, { method: "POST", body: trial.file, headers: { "Content-Type": trial.file.type || "application/octet-stream" } });
  const told = await answer.json();
  if (told.top) showTop(box, told);
  else showOutputs(box, told.outputs, told);
}

async function tryText(face, box) {
  const prompt = byId("trial-prompt").value, most = Number(byId("trial-tokens").value) || 16;
  if (!prompt) {
    byId("trial-prompt").focus();
    throw new Error("Write a prompt first.");
  }
  const body = JSON.stringify({ model: face.name, prompt, max_tokens: most, stream: true });
  const answer = await api.fetch("/v1/completions", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  const shown = startText(box, prompt);
  await readParts(answer, (part) => {
    const data = dataOf(part);
    if (!data || data === "[DONE]") return;
    const told = JSON.parse(data);
    if (told.error) throw new Refusal(told.error.code ?? 500, { error: told.error.message });
    shown.add(told.choices?.[0]?.text ?? "");
    if (told.narrowboat) shown.end(told.narrowboat);
  });
}

async function tryEmbedding(face, box) {
  const input = byId("trial-prompt").value;
  if (!input) {
    byId("trial-prompt").focus();
    throw new Error("Write a text first.");
  }
  const told = await api.json("POST", "/v1/embeddings", { model: face.name, input });
  const data = told.data[0].embedding;
  showOutputs(box, summarise([{ name: "embedding", datatype: "FP32", shape: [data.length], data }]), told.narrowboat ?? {});
}

async function tryTensors(face, box) {
  const field = byId("trial-json");
  let inputs;
  field.removeAttribute("aria-invalid");
  try {
    inputs = JSON.parse(field.value).inputs.map(fillIn);
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
    throw new Error(`These are no inputs: ${error.message}`);
  }
  const told = await api.json("POST", `/v2/models/${encodeURIComponent(face.name)}/infer`, { inputs });
  showOutputs(box, summarise(told.outputs), told.parameters ?? {});
}

/** Data that is a word becomes numbers of the tensor's type. */
function fillIn(input) {
  if (typeof input.data !== "string") return input;
  const count = input.shape.reduce((a, b) => a * b, 1), whole = /INT/.test(input.datatype), truth = input.datatype === "BOOL";
  const kinds = { zeros: () => 0, ones: () => 1, random: () => (whole || truth ? Math.floor(Math.random() * 2) : Number((Math.random() * 2 - 1).toFixed(4))) };
  if (!kinds[input.data]) throw new Error(`data is "${input.data}"; write numbers, "zeros", "ones" or "random"`);
  const data = Array.from({ length: count }, kinds[input.data]);
  return { ...input, data: truth ? data.map(Boolean) : data };
}
