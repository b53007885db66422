// Server-sent events by fetch, which unlike EventSource can carry a token.

const LONGEST_SILENCE = 25000; // milliseconds; the gateway says something every ten seconds
const LONGEST_PART = 16 << 20; // characters of one event

/** Call `onPart` with each part of a text that ends in an empty line. */
async function readParts(answer, onPart, alive = () => {}) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    rest += value.replaceAll("\r", "");
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      onPart(rest.slice(0, end));
      rest = rest.slice(end + 2);
    }
    if (rest.length > LONGEST_PART) throw new Error("an event without an end");
  }
}

/** The data of one server-sent event. */
const dataOf = (part) => part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");

/** Follow the events until the page goes: `onEvent(event)`, and `onLink(true | false)` as the connection comes and goes. */
async function followEvents(onEvent, onLink) {
  let tries = 0, current = null;
  api.logins.add(() => current?.abort());
  const forever = true;
  while (forever) {
    current = new AbortController();
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => current.abort(), LONGEST_SILENCE);
    };
    try {
      alive();
      const answer = await api.fetch("/v1/events", { signal: current.signal, headers: { Accept: "text/event-stream" } });
      tries = 0;
      await readParts(answer, (part) => {
        const data = dataOf(part);
        if (data) onEvent(JSON.parse(data));
      }, alive);
      onLink(false, "the gateway ended the connection");
    } catch (error) {
      onLink(false, error instanceof Refusal ? error.message : "the connection was lost");
      if (error instanceof Refusal && error.status === 401) await nextLogin();
    }
    clearTimeout(timer);
    tries += 1;
    await new Promise((resolve) => setTimeout(resolve, Math.min(500 * 1.6 ** tries, 8000) * (0.8 + 0.4 * Math.random())));
  }
}

/** Whoever refused to give a token is not asked again at once, but after a minute, or with the next token. */
function nextLogin() {
  return new Promise((resolve) => {
    const timer = setTimeout(end, 60000);
    function end() {
      clearTimeout(timer);
      api.logins.delete(end);
      resolve();
    }
    api.logins.add(end);
  });
}
