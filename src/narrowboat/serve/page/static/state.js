// What the page knows: the last events, in bounded memory, and who wants to hear of them.

const OUTCOMES = ["done", "late", "skipped", "aborted", "failed", "unfinished"];
const DOINGS = ["load", "compute", "prefetch", "adopt", "abort", "run", "swap_out", "swap_in"];
const RESPONSES = 240; // of each task
const MOST_TASKS = 128; // of which anything is kept

const run = {
  linked: false,
  why: "",
  state: "connecting",
  said: "",
  plan: null,
  faces: [],
  tick: null,
  lostAt: -1, // when something happened that was not listed
  memory: new Ring(1024, { time: Float64Array, resident: Float64Array, swap: Float64Array, other: Float64Array, budget: Float64Array, peak: Float64Array }),
  segments: new Ring(24000, { begin: Float64Array, end: Float64Array, engine: Uint8Array, what: Uint8Array, task: Uint16Array, job: Int32Array, block: Int32Array, bytes: Float64Array }),
  jobs: new Ring(4096, { release: Float64Array, due: Float64Array, finish: Float64Array, outcome: Uint8Array, task: Uint16Array, job: Int32Array }),
  names: [],
  known: new Map(), // name -> {responses, worst, causes}
  listeners: { tick: new Set(), plan: new Set(), state: new Set(), faces: new Set() },

  on(kinds, listener) {
    for (const kind of kinds.split(" ")) this.listeners[kind].add(listener);
  },

  tellAll(kind) {
    this.listeners[kind].forEach((listener) => listener());
  },

  hear(event) {
    if (event.event === "tick") {
      this.take(event);
      this.tellAll("tick");
    } else if (event.event === "hello") {
      this.linked = true;
      this.say(event.state, event.said);
      this.setPlan(event.plan);
      event.ticks.forEach((tick) => this.take(tick));
      this.tellAll("tick");
    } else if (event.event === "plan") {
      this.setPlan(event.plan);
    } else if (event.event === "lost") {
      this.lostAt = this.tick?.now_us ?? -1;
    } else if (event.event === "state") {
      this.say(event.state, event.said);
    }
  },

  link(linked, why) {
    this.linked = linked;
    this.why = why;
    this.tellAll("state");
  },

  say(state, said) {
    this.state = state;
    this.said = said || "";
    this.tellAll("state");
    this.refreshFaces();
  },

  setPlan(plan) {
    if (!plan || !plan.tasks) return;
    for (const task of plan.tasks) {
      const before = planned(task.name);
      if (before && before.response_bound_us !== task.response_bound_us && this.known.has(task.name)) {
        this.known.get(task.name).worst = 0; // of another bound
        this.known.get(task.name).responses.clear();
      }
    }
    this.plan = plan;
    plan.tasks.forEach((task) => theme.number(task.name));
    this.tellAll("plan");
    this.refreshFaces();
  },

  refreshFaces: debounce(100, async () => {
    try {
      run.faces = (await api.json("GET", "/v1/tasks")).tasks;
      run.tellAll("faces");
    } catch { /* the stream says what is wrong */ }
  }),

  /** A tick that has not been seen yet; those of an executor that was started anew begin again at 0. */
  take(tick) {
    const last = this.tick;
    if (last && tick.time <= last.time) return;
    if (last && tick.now_us < last.now_us) this.forget();
    this.tick = tick;
    if (tick.segments_lost || tick.jobs_lost) this.lostAt = tick.now_us;
    const { resident = 0, swap = 0, other = 0 } = tick.pools || {};
    this.memory.push(tick.time, resident, swap, other, tick.budget_bytes, tick.peak_bytes ?? tick.held_bytes);
    for (const [engine, what, task, job, block, begin, end, bytes] of tick.segments || []) {
      this.segments.push(begin, end, engine === "compute" ? 1 : 0, Math.max(0, DOINGS.indexOf(what)), this.number(task), job, block, bytes || 0);
    }
    for (const job of tick.jobs || []) this.end(job);
  },

  end(job) {
    const outcome = Math.max(0, OUTCOMES.indexOf(job.outcome)), known = this.task(job.task);
    this.jobs.push(job.release, job.due, job.finish ?? NaN, outcome, this.number(job.task), job.number);
    if (job.finish !== null && job.finish !== undefined) {
      known.responses.push(job.finish - job.release, outcome, job.number);
      known.worst = Math.max(known.worst, job.finish - job.release);
    }
    if (outcome) {
      const causes = known.causes;
      causes.set(job.outcome, { count: (causes.get(job.outcome)?.count || 0) + 1, last: job.cause || "" });
    }
  },

  /** What is kept of a task. */
  task(name) {
    if (!this.known.has(name)) {
      if (this.known.size >= MOST_TASKS) this.known.delete(this.known.keys().next().value);
      this.known.set(name, { responses: new Ring(RESPONSES, { response: Float64Array, outcome: Uint8Array, job: Int32Array }), worst: 0, causes: new Map() });
    }
    return this.known.get(name);
  },

  number(name) {
    const found = this.names.indexOf(name);
    if (found >= 0) return found;
    if (this.names.length >= 4 * MOST_TASKS) {
      this.forget();
      this.names.length = 0;
    }
    return this.names.push(name) - 1;
  },

  forget() {
    this.lostAt = -1;
    this.segments.clear();
    this.jobs.clear();
    this.known.clear();
  },
};
