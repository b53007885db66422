// Elements, made and changed without ever reading text as markup.

const byId = (id) => document.getElementById(id);

/** A new element: properties by name, attributes where the name has a dash or is "role" or "scope", then children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set text only where it differs: a page that stands still costs nothing. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** A table of rows of texts; the first cell of each row is its heading; columns named in `right` hold numbers. */
function makeTable(caption, columns, rows, right = []) {
  const side = (k) => (right.includes(k) ? "right" : "");
  return make("table", {},
    make("caption", { className: "unseen" }, caption),
    make("thead", {}, make("tr", {}, ...columns.map((name, k) => make("th", { scope: "col", className: side(k) }, name)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, k) =>
      k === 0 ? make("th", { scope: "row" }, cell) : make("td", { className: side(k) }, cell))))));
}

/** A message with its kind: "good", "bad" or "". */
function tell(element, kind, ...children) {
  element.dataset.is = kind;
  element.replaceChildren(...children);
}

const listOf = (texts) => make("ul", {}, ...texts.map((text) => make("li", {}, text)));

/** Call after `wait` milliseconds of rest. */
function debounce(wait, call) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), wait);
  };
}

/** Ask before something changes; true if it may. */
function confirmChange(title, action, ...text) {
  const dialog = byId("ask");
  byId("ask-title").textContent = title;
  byId("ask-text").replaceChildren(...text.map((part) => (typeof part === "string" ? make("p", {}, part) : part)));
  byId("ask-yes").textContent = action;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
