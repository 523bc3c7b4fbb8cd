// The page of policies: an editor that checks while one types, the difference to the file, and earlier versions.

import {call, get, part} from "./api.js";
import {Contracts} from "./contracts.js";
import {diff, same} from "./diff.js";
import {alertBox, attempt, labelled, make} from "./dom.js";

const PAUSE = 300;     // milliseconds without a key until a text is checked
const EVERY = 5_000;   // milliseconds between two looks at the file
const saved = new Map();  // by KMS: the versions that this page has replaced, oldest first

function text(policy) {
  return JSON.stringify(policy, null, 2);
}

export async function show(content, [wanted]) {
  const {policies, guests, webhooks, chain} = await get("/stack");
  const names = Object.keys(policies), chosen = names.includes(wanted) ? wanted : names[0];
  for (const name of Object.keys(webhooks))
    content.append(make("p", {class: "note"}, `kms-${name} asks your webhook: its policy is there.`));
  const contracts = chain ? new Contracts(guests, chain.decides_for) : null;
  if (contracts) {
    content.append(contracts.element);
    await contracts.start();
  }
  if (chosen === undefined) return () => contracts?.stop();
  const select = make("select", {onchange: () => { location.hash = `#/policies/${part(select.value)}`; }},
    names.map((name) => make("option", {value: name, selected: name === chosen}, `kms-${name}`)));
  const editor = new Editor(chosen, policies[chosen]);
  content.append(make("div", {class: "row"}, labelled("Policy of", "policy-of", select), grants(chosen, Object.keys(guests), editor)),
    editor.element);
  await editor.start();
  return () => {
    contracts?.stop();
    editor.stop();
  };
}

// Allows or denies a trust domain of the stack by what it measures now.
function grants(kms, guests, editor) {
  const select = make("select", {}, guests.map((name) => make("option", {value: name}, name)));
  const change = (verb) => (event) => attempt(editor.alert, event.currentTarget, async () => {
    const name = select.value;
    await editor.replace(() => call("POST", `/policies/${part(kms)}/${verb}`, {guest: name}));
    editor.done.textContent = `The policy ${verb === "allow" ? "allows" : "does not allow"} ${name} now.`;
  });
  return make("div", {class: "row"}, labelled("Trust domain", "policy-guest", select),
    make("button", {onclick: change("allow")}, "Allow it"), make("button", {onclick: change("deny")}, "Deny it"));
}

class Editor {
  constructor(kms, path) {
    this._kms = kms;
    this._path = `/policies/${part(kms)}`;
    this._base = null;   // the file as it was read last
    this._text = "";     // the same as text
    this._turn = 0;
    this.alert = alertBox();
    this.done = make("p", {role: "status"});
    this._unchecked = alertBox();
    this._problems = make("ul", {"aria-label": "Problems"});
    this._diff = make("div");
    this._area = make("textarea", {rows: 24, spellcheck: "false", autocomplete: "off", "aria-describedby": "policy-help policy-problems", oninput: () => this._typed()});
    this._area.readOnly = true;  // until it has its text, which would replace what is typed before
    this._save = make("button", {onclick: (event) => this._store(event)}, "Save");
    this._undo = make("button", {onclick: () => this._load(this._text)}, "Discard changes");
    this._versions = make("select", {onchange: () => this._version()});
    this.element = make("div", {},
      make("p", {class: "note", id: "policy-help"}, `The webhook reads the file ${path} at every request.`),
      labelled("Policy (JSON)", "policy-text", this._area),
      make("div", {role: "status", id: "policy-problems"}, this._problems), this._unchecked,
      make("div", {class: "row"}, this._save, this._undo, labelled("Earlier version", "policy-version", this._versions)),
      this.alert, this.done, make("h2", {}, "What changes"), this._diff);
  }

  async start() {
    await attempt(this.alert, null, async () => this._read(await get(this._path)));
    if (this._base === null) this._load("{}");
    this._area.readOnly = false;
    await this._offer();
    this._timer = setInterval(() => this._look(), EVERY);
  }

  stop() {
    clearInterval(this._timer);
    clearTimeout(this._waiting);
  }

  // Runs what changes the file, keeps the version before, and shows the one after.
  async replace(change) {
    if (this._base !== null) saved.set(this._kms, [...saved.get(this._kms) ?? [], {time: new Date(), policy: this._base}]);
    await change();
    this._read(await get(this._path));
    await this._offer();
  }

  _read(policy) {
    this._base = policy;
    this._text = text(policy);
    this._load(this._text);
  }

  _load(policy) {
    this._area.value = policy;
    this.done.textContent = "";
    this._check();
  }

  get _isChanged() {
    return this._area.value !== this._text;
  }

  // Follows a file that somebody else changes, unless there are changes here.
  async _look() {
    if (document.visibilityState !== "visible" || this._isChanged) return;
    const now = await get(this._path).catch(() => null);
    if (now !== null && !this._isChanged && !same(now, this._base)) {
      this._read(now);
      this.done.textContent = "The file has changed, and this is its present text.";
    }
  }

  _typed() {
    this.done.textContent = "";
    clearTimeout(this._waiting);
    this._waiting = setTimeout(() => this._check(), PAUSE);
  }

  async _check() {
    const turn = ++this._turn;
    await attempt(this._unchecked, null, async () => {
      const found = await call("POST", `${this._path}/check`, {text: this._area.value});
      if (turn !== this._turn) return;
      const place = found.line === null ? "" : `Line ${found.line}: `;
      const problems = [found.problem === null ? [] : `${place}${found.problem}`, found.warnings].flat();
      const said = [...this._problems.children].map((each) => each.textContent);
      if (said.join("\n") !== problems.join("\n")) this._problems.replaceChildren(...problems.map((each, index) =>
        make("li", {class: index === 0 && found.problem !== null ? "refused" : "unanswered"}, each)));
      this._area.setAttribute("aria-invalid", String(found.problem !== null));
      this._diff.replaceChildren(found.diff ? diff(found.diff) : make("p", {class: "dim"}, found.line === null ? "Nothing." : "It is not JSON yet."));
      this._save.disabled = found.line !== null || !found.diff;
      this._save.textContent = found.problem === null || found.line !== null ? "Save" : "Save all the same: it denies everyone";
      this._undo.disabled = !this._isChanged;
    });
  }

  async _store(event) {
    await attempt(this.alert, event.currentTarget, async () => {
      const policy = JSON.parse(this._area.value), now = await get(this._path).catch(() => this._base);
      if (!same(now, this._base)) {
        this._base = now;
        this._text = text(now);
        await this._check();
        throw new Error("The file has changed meanwhile. What changes is shown below: press Save again to replace the file.");
      }
      await this.replace(() => call("PUT", this._path, policy));
      this.done.textContent = "Saved: the next request reads it.";
    });
    await this._check();
  }

  // What can be loaded into the editor: the versions that were replaced here, and those of the snapshots.
  async _offer() {
    const snapshots = await get("/snapshots");
    const versions = (saved.get(this._kms) ?? []).map(({time}, index) =>
      make("option", {value: `saved ${index}`}, `before the change at ${time.toTimeString().slice(0, 8)}`)).reverse();
    this._versions.replaceChildren(make("option", {value: ""}, "choose one to see what it would change"), ...versions,
      ...snapshots.map((name) => make("option", {value: `snapshot ${name}`}, `of the snapshot ${name}`)));
  }

  async _version() {
    const [kind, ...rest] = this._versions.value.split(" "), name = rest.join(" ");
    await attempt(this.alert, null, async () => {
      if (kind === "saved") this._load(text(saved.get(this._kms)[Number(name)].policy));
      if (kind === "snapshot") this._load(text(await get(`/snapshots/${part(name)}/policies/${part(this._kms)}`)));
    });
    this._versions.value = "";
  }
}
