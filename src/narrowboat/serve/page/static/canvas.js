// Canvases that are drawn when there is something new, when they can be seen, and sharply.

const FONT = '12px system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) Painting.of.get(target)?.show(isIntersecting);
}, { rootMargin: "80px" });
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) Painting.of.get(target)?.ask(true);
});

class Painting {
  static of = new WeakMap();

  /** @param {HTMLCanvasElement} canvas @param {(context, width, height) => void} draw in CSS pixels @param {number} every milliseconds at least from one to the next */
  constructor(canvas, draw, every = 80) {
    Object.assign(this, { canvas, draw, every, visible: false, asked: 0, later: 0, drawn: 0, context: canvas.getContext("2d") });
    this.fills = canvas.parentElement?.classList.contains("chart") ?? false; // its box says how tall it is
    if (!this.fills) this.height = Number(canvas.dataset.height) || 30;
    Painting.of.set(canvas, this);
    seen.observe(canvas);
    sized.observe(canvas);
    this.again = () => this.ask(true);
    theme.listeners.add(this.again);
  }

  get height() {
    return this.tall;
  }

  set height(height) {
    if (this.tall === height) return;
    this.tall = height;
    this.canvas.style.height = `${height}px`;
  }

  show(visible) {
    this.visible = visible;
    if (visible) this.ask(true);
  }

  /** Draw with a frame soon; where motion is not wanted, once a second unless it is `now`. */
  ask(now = false) {
    if (!this.visible || this.asked) return;
    const wait = now ? 0 : this.drawn + (calm.matches ? 1000 : this.every) - performance.now();
    if (wait > 0) {
      this.later ||= setTimeout(() => this.ask(true), wait);
      return;
    }
    clearTimeout(this.later);
    this.later = 0;
    this.asked = requestAnimationFrame(() => {
      this.asked = 0;
      this.drawn = performance.now();
      const { canvas, context } = this, ratio = devicePixelRatio, width = canvas.clientWidth;
      if (!width) return;
      if (this.fills) this.tall = canvas.clientHeight;
      const [wide, tall] = [Math.round(width * ratio), Math.round(this.tall * ratio)];
      if (canvas.width !== wide || canvas.height !== tall) Object.assign(canvas, { width: wide, height: tall });
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, this.tall);
      context.font = FONT;
      this.draw(context, width, this.tall);
    });
  }

  /** The canvas is gone. */
  end() {
    cancelAnimationFrame(this.asked);
    clearTimeout(this.later);
    theme.listeners.delete(this.again);
    seen.unobserve(this.canvas);
    sized.unobserve(this.canvas);
  }
}

/** Text on a line of its own height, moved so that it stays between `left` and `right`. */
function writeInside(context, text, x, y, left, right, align = "center") {
  const width = context.measureText(text).width;
  const start = align === "center" ? x - width / 2 : align === "right" ? x - width : x;
  context.fillText(text, Math.min(Math.max(start, left), right - width), y);
}

/** Buttons "Table": each shows numbers beside its chart, made anew once a second while they are shown. */
function tableButton(id, makeContent) {
  const box = byId(id), button = document.querySelector(`[data-table="${id}"]`);
  let made = 0;
  const refresh = () => {
    if (box.hidden || document.hidden || performance.now() - made < 1000) return;
    if (box.matches(":hover") && made && getSelection().toString()) return; // someone copies from it
    made = performance.now();
    box.replaceChildren(makeContent());
  };
  button.addEventListener("click", () => {
    box.hidden = !box.hidden;
    button.setAttribute("aria-expanded", String(!box.hidden));
    made = 0;
    refresh();
  });
  run.on("tick plan", refresh);
}
