// Tasks that are known: which run, and which could be loaded.

function startTasks() {
  run.on("faces", showTasks);
}

function showTasks() {
  const body = document.querySelector("#tasks tbody"), held = document.activeElement?.dataset?.task;
  body.replaceChildren(...run.faces.map((face) => {
    const action = face.ready ? "Unload" : "Load";
    const button = make("button", { type: "button", className: "quiet", "aria-label": `${action} ${face.name}`, onclick: () => changeTask(face, button) }, action);
    button.dataset.task = face.name;
    const contract = `every ${formatTime(face.period_us)}${face.burst > 1 ? `, ${face.burst} at once` : ""}`;
    return make("tr", {},
      make("th", { scope: "row" }, make("span", { className: "name" }, makeChip(face.name), face.name)),
      make("td", {}, face.model || "described by blocks", make("small", {}, `${face.guaranteed ? "guaranteed" : "best effort"}, ${contract}`)),
      make("td", {}, face.ready ? "runs" : "not loaded", make("small", {}, face.ready ? (face.takes_requests ? "takes requests" : "has its own input") : face.reason === "not loaded" ? "" : face.reason)),
      make("td", {}, button));
  }));
  if (held) body.querySelector(`[data-task="${CSS.escape(held)}"]`)?.focus();
}

async function changeTask(face, button) {
  const told = byId("tasks-told"), what = face.ready ? "unload" : "load";
  if (face.ready && !(await confirmChange(`Unload ${face.name}?`, "Unload it", "The other tasks go on. Its requests are refused until it is loaded and admitted again."))) return;
  button.disabled = true;
  tell(told, "", face.ready ? `Unloading ${face.name} …` : `Asking for the admission of ${face.name} …`);
  try {
    await api.json("POST", `/v2/repository/models/${encodeURIComponent(face.name)}/${what}`, {});
    tell(told, "good", face.ready ? `✓ ${face.name} is unloaded.` : `✓ ${face.name} was admitted, and runs.`);
  } catch (error) {
    tell(told, "bad", make("b", {}, face.ready ? `✕ ${face.name} goes on. ` : `✕ ${face.name} was not loaded. `), ...explain(error));
  }
  button.disabled = false;
  run.refreshFaces();
}
