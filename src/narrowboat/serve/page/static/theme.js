// Light and dark, and the colours and patterns of tasks: no two tasks differ by colour alone.

const COLOURS = ["panel", "sunk", "line", "edge", "text", "faint", "strong", "good", "warn", "bad", "resident", "swap", "other",
  "on-strong", "t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7"];
const KEPT = "narrowboat-theme";

const theme = {
  colours: {},
  listeners: new Set(),
  patterns: new Map(),
  numbers: new Map(),

  start() {
    try {
      const kept = localStorage.getItem(KEPT);
      if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
    } catch { /* storage may be forbidden; then the choice lasts as long as the page */ }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.read());
    byId("theme").addEventListener("click", () => this.turn());
    this.read();
  },

  get dark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },

  turn() {
    const chosen = this.dark ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    try {
      localStorage.setItem(KEPT, chosen);
    } catch { /* as above */ }
    this.read();
  },

  /** Read the colours that are in force, and let everything that is drawn be drawn anew. */
  read() {
    const probe = make("span", { hidden: true });
    document.body.append(probe);
    for (const name of COLOURS) {
      probe.style.color = `var(--${name})`;
      this.colours[name] = getComputedStyle(probe).color;
    }
    probe.remove();
    this.patterns.clear();
    setText(byId("theme"), this.dark ? "Light theme" : "Dark theme");
    document.querySelectorAll("canvas.chip").forEach((chip) => paintChip(chip));
    this.listeners.forEach((listener) => listener());
  },

  /** The number of a task; it keeps it, whatever comes and goes. */
  number(task) {
    if (!this.numbers.has(task)) {
      if (this.numbers.size >= 512) this.numbers.clear();
      this.numbers.set(task, this.numbers.size);
    }
    return this.numbers.get(task);
  },

  colour(task) {
    return this.colours[`t${this.number(task) % 8}`];
  },

  /** What to fill a task's shapes with: its colour, with a pattern of its own. */
  fill(context, task) {
    const number = this.number(task);
    return this.pattern(context, `t${number % 8}`, number % 6);
  },

  pattern(context, colour, kind) {
    if (kind === 0) return this.colours[colour];
    const key = `${colour} ${kind} ${devicePixelRatio}`;
    if (!this.patterns.has(key)) {
      if (this.patterns.size > 256) this.patterns.clear(); // the pixel ratio follows the zoom
      this.patterns.set(key, patternTile(this.colours[colour], this.colours.panel, kind));
    }
    const pattern = context.createPattern(this.patterns.get(key), "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / devicePixelRatio));
    return pattern;
  },
};

/** Eight by eight pixels of a colour with thin lines or dots of another. */
function patternTile(colour, over, kind) {
  const tile = document.createElement("canvas"), size = Math.round(8 * devicePixelRatio);
  tile.width = tile.height = size;
  const context = tile.getContext("2d");
  context.scale(size / 8, size / 8);
  context.fillStyle = colour;
  context.fillRect(0, 0, 8, 8);
  context.globalAlpha = 0.5;
  context.strokeStyle = context.fillStyle = over;
  context.lineWidth = 1.4;
  context.beginPath();
  if (kind === 1 || kind === 5) {
    for (const shift of [-8, 0, 8]) {
      context.moveTo(shift - 1, kind === 1 ? 9 : -1);
      context.lineTo(shift + 9, kind === 1 ? -1 : 9);
    }
  } else if (kind === 3 || kind === 4) {
    for (const at of [2, 6]) {
      context.moveTo(kind === 3 ? 0 : at, kind === 3 ? at : 0);
      context.lineTo(kind === 3 ? 8 : at, kind === 3 ? at : 8);
    }
  } else {
    for (const [x, y] of [[2, 2], [6, 6]]) {
      context.moveTo(x + 1.2, y);
      context.arc(x, y, 1.2, 0, 7);
    }
    context.fill();
  }
  context.stroke();
  return tile;
}

/** A small square in a task's colour and pattern. */
function makeChip(task) {
  const chip = make("canvas", { className: "chip", "aria-hidden": "true" });
  chip.dataset.task = task;
  paintChip(chip);
  return chip;
}

function paintChip(chip) {
  chip.width = chip.height = 14 * devicePixelRatio;
  const context = chip.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.fillStyle = theme.fill(context, chip.dataset.task);
  context.fillRect(0, 0, 14, 14);
}
