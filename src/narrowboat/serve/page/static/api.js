// What the page asks of the gateway, and the token that it asks with.

const KEY = "narrowboat-token";

/** A refusal: the status, the message, and what else the answer held. */
class Refusal extends Error {
  constructor(status, told, retryAfter = null) {
    super(told.error || `the gateway answered ${status}`);
    this.status = status;
    this.told = told;
    this.retryAfter = retryAfter;
  }
}

const api = {
  memory: "",
  asking: null,
  logins: new Set(),

  get token() {
    try {
      return sessionStorage.getItem(KEY) || this.memory;
    } catch {
      return this.memory;
    }
  },

  set token(token) {
    this.memory = token;
    try {
      if (token) sessionStorage.setItem(KEY, token);
      else sessionStorage.removeItem(KEY);
    } catch { /* it is kept in this page */ }
    byId("logout").hidden = !token;
    this.logins.forEach((listener) => listener());
  },

  start() {
    byId("logout").hidden = !this.token;
    byId("logout").addEventListener("click", () => { this.token = ""; });
  },

  headers(more = {}) {
    return this.token ? { ...more, Authorization: `Bearer ${this.token}` } : more;
  },

  /** Fetch; where the gateway wants a token, ask for one and fetch again. Throws Refusal. */
  async fetch(path, options = {}) {
    for (;;) {
      const used = this.token;
      const answer = await fetch(path, { ...options, headers: this.headers(options.headers), cache: "no-store", credentials: "omit" });
      if (answer.ok) return answer;
      if (answer.status === 401 && (used !== this.token || (await this.login()))) continue;
      throw new Refusal(answer.status, await readError(answer), answer.headers.get("Retry-After"));
    }
  },

  async json(method, path, body) {
    const options = body === undefined ? { method } : { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
    const text = await (await this.fetch(path, options)).text();
    return text ? JSON.parse(text) : {};
  },

  /** Ask for a token, once for all who want it; true if there is one. */
  login() {
    this.asking ??= new Promise((resolve) => {
      const dialog = byId("login"), field = byId("token");
      if (this.token) byId("login-note").textContent = "That token is not known here. Another is kept in this tab only.";
      field.value = "";
      dialog.returnValue = "no";
      dialog.showModal();
      dialog.addEventListener("close", () => {
        const given = dialog.returnValue === "yes" ? field.value.trim() : "";
        field.value = "";
        this.asking = null;
        this.token = given;
        resolve(given !== "");
      }, { once: true });
    });
    return this.asking;
  },
};

async function readError(answer) {
  try {
    const told = JSON.parse(await answer.text());
    if (told && typeof told === "object") {
      const message = typeof told.error === "string" ? told.error : told.error?.message || told.detail;
      return { ...told, error: typeof message === "string" ? message : "" };
    }
  } catch { /* no JSON: the status says what there is to say */ }
  return {};
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

/** Why something was not done, as elements: the message, reasons and suggestions. */
function explain(error) {
  if (!(error instanceof Refusal)) return [make("p", {}, "The gateway cannot be reached.")];
  const { reasons = [], suggestions = [] } = error.told;
  const hint = error.status === 403 ? " This token has not the right to do it." : error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const parts = [make("p", {}, sentence(reasons.length ? "Refused; nothing was changed" : error.message) + hint)];
  if (reasons.length) parts.push(listOf(reasons));
  if (suggestions.length) parts.push(make("p", {}, "What would help:"), listOf(suggestions));
  return parts;
}
