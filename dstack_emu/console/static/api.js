// The control API of the stack that served this page. A token, if the stack demands one, is typed by a person, kept in
// the storage of this tab, and sent as a header.

const BASE = new URL("../", import.meta.url);
const KEY = "dstack-emu control token";

export class Refused extends Error {
  constructor(text, status) {
    super(text);
    this.status = status;
  }
}

let login = null;

function send(method, path, body, options) {
  const headers = {};
  const token = sessionStorage.getItem(KEY);
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  return fetch(new URL(path.slice(1), BASE), {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", ...options,
  });
}

async function authorized(method, path, body, options) {
  for (;;) {
    let answer;
    try {
      answer = await send(method, path, body, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("the stack does not answer: it has ended, or it starts again", 0);
    }
    if (answer.status !== 401) return answer;
    login ??= askForToken().finally(() => { login = null; });
    await login;
  }
}

// One call. Resolves to its answer; rejects with the stack's own words.
export async function call(method, path, body) {
  const answer = await authorized(method, path, body);
  const parsed = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(parsed?.error ?? `${method} ${path}: status ${answer.status}`, answer.status);
  return parsed;
}

// A text, such as a picture.
export async function text(path) {
  const answer = await authorized("GET", path);
  const said = await answer.text();
  if (!answer.ok) throw new Refused(said, answer.status);
  return said;
}

export function get(path) {
  return call("GET", path);
}

export function part(name) {
  return encodeURIComponent(name);
}

// Opens the stream of the journal, and returns its records as their calls end, until the signal aborts or the stack ends.
export async function stream(since, signal) {
  const answer = await authorized("GET", `/journal/stream?since=${since}`, undefined, {signal});
  if (!answer.ok) throw new Refused(`the journal's stream: status ${answer.status}`, answer.status);
  return records(answer.body.pipeThrough(new TextDecoderStream()).getReader());
}

async function* records(reader) {
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// Asks until a token is right.
async function askForToken() {
  const dialog = document.getElementById("login"), field = document.getElementById("token");
  const problem = document.getElementById("login-problem"), form = dialog.querySelector("form");
  const tell = (text) => {
    problem.textContent = text;
    field.setAttribute("aria-invalid", String(text !== ""));
  };
  const open = () => dialog.showModal();  // again, if it is closed by the keyboard: nothing can be shown without a token
  dialog.addEventListener("close", open);
  open();
  tell(sessionStorage.getItem(KEY) === null ? "" : "The stack takes this token no more.");
  try {
    for (;;) {
      await new Promise((resolve) => form.addEventListener("submit", (event) => {
        event.preventDefault();
        resolve();
      }, {once: true}));
      const token = field.value.trim();
      if (!/^[!-~]+$/.test(token)) {
        tell("A token consists of visible ASCII characters.");
        continue;
      }
      sessionStorage.setItem(KEY, token);
      const answer = await send("GET", "/clock").catch(() => ({status: 0}));
      if (answer.status !== 401 && answer.status !== 0) return;
      tell(answer.status ? "The stack has another token." : "The stack does not answer.");
    }
  } finally {
    field.value = "";
    dialog.removeEventListener("close", open);
    dialog.close();
  }
}
