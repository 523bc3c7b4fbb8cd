// The page of evidence: what somebody has, pasted or dropped, or what a part of the stack has now; what it is, whether it
// verifies, and which KMS would admit it. The stack keeps nothing of it, and neither does this page.

import {call, get, part} from "./api.js";
import {alertBox, attempt, choice, labelled, make, tied} from "./dom.js";
import {contents} from "./contents.js";
import {checked, decisions} from "./verdicts.js";

const MOST = 10 * 1024 * 1024;  // bytes, as the stack reads them
const HEAD = new Set(["what", "sure", "form", "size"]);

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

// What a part of the stack has now: a text, and whose it is.
async function ofStack([kind, name, file]) {
  if (kind === "guest") {
    const text = JSON.stringify(await get(`/guests/${part(name)}/evidence`), null, 1);
    return {text, caller: name.startsWith("kms-") ? "kms" : "app", what: `The evidence of ${name}, as it is now, and not as an earlier call verified it: the journal keeps no quotes.`};
  }
  if (kind === "kms") return {text: (await get(`/kms/${part(name)}/certificates/${part(file)}`)).pem, caller: "kms", what: `${file} of kms-${name}`};
  return {text: (await get(`/certificates/${part(name)}`)).pem, caller: "app", what: name};
}

export async function show(content, chosen) {
  const alert = alertBox(), said = make("p", {role: "status"}), results = make("div");
  const area = make("textarea", {rows: 5, spellcheck: false, autocomplete: "off", oninput: () => take(null)});
  const picker = make("input", {type: "file", onchange: () => picker.files.length && drop(picker.files[0])});
  const caller = choice(["app", "kms"], "app"), app = make("input", {type: "text", autocomplete: "off", spellcheck: false});
  const button = make("button", {}, "Decode, verify and decide");
  let file = null, turn = 0;
  tied(alert, {text: area});

  const form = make("form", {"aria-label": "Evidence", onsubmit: (event) => {
    event.preventDefault();
    run();
  }}, labelled("Evidence: a quote, an attestation, certificates, an event log, an app-compose, or an answer that has one of them", "evidence-text", area),
  make("div", {class: "row"}, labelled("or a file, which may also be dropped on this page", "evidence-file", picker),
    labelled("Decide about it as about that of an", "evidence-caller", caller),
    labelled("App id, if it is an app-compose", "evidence-app", app), button), said, alert);
  content.append(make("p", {class: "note"}, "In any form: binary, hex, base64, PEM or JSON; 10 MiB at most. It is sent to this stack alone, which keeps nothing of it. ",
    "An app-compose is known by its bytes, and a pasted text may have other line ends: take the file."), form, results);

  function take(taken) {
    file = taken;
    said.textContent = file === null ? "" : `The file ${file.name}, ${file.size} bytes`;
  }

  function drop(dropped) {
    area.value = "";
    take(dropped);
    run();
  }

  async function given() {
    if (file === null) return {text: area.value};
    if (file.size > MOST) throw new Error(`input of at most ${MOST} bytes expected, got ${file.size}`);
    return {data: await base64(file)};
  }

  function run() {
    const own = ++turn;
    results.replaceChildren();
    return attempt(alert, button, async () => {
      const body = await given(), found = await call("POST", "/inspect", body);
      const [verified, decided] = await Promise.all([asked("/verify", body), asked("/admit", question(body))]);
      if (own === turn) results.replaceChildren(...described(found, verified, decided));
      results.querySelector("h2")?.focus();
    });
  }

  function question(body) {
    const id = app.value.trim();
    return {...body, caller: caller.value, ...id ? {app_id: id} : {}};
  }

  const over = (event) => {
    event.preventDefault();
    form.classList.add("dropping");
  };
  const out = () => form.classList.remove("dropping");
  const dropped = (event) => {
    event.preventDefault();
    out();
    const [first] = event.dataTransfer.files, text = event.dataTransfer.getData("text/plain");
    if (first) drop(first);
    else if (text) {
      area.value = text;
      take(null);
      run();
    }
  };
  const listeners = [["dragover", over], ["dragleave", out], ["drop", dropped]];
  for (const [name, listener] of listeners) addEventListener(name, listener);

  if (chosen.length) {
    await attempt(alert, null, async () => {
      const own = await ofStack(chosen);
      area.value = own.text;
      caller.value = own.caller;
      said.textContent = own.what;
      await run();
    });
  }
  return () => {
    for (const [name, listener] of listeners) removeEventListener(name, listener);
  };
}

// An answer, or the stack's own words why there is none.
function asked(path, body) {
  return call("POST", path, body).catch((error) => {
    if (!error.status) throw error;
    return {refused: error.message};
  });
}

function described(found, verified, decided) {
  const description = Object.fromEntries(Object.entries(found).filter(([name]) => !HEAD.has(name)));
  const form = found.form.join(" of ") || "binary";
  const refused = ({refused: text}) => [make("p", {class: "note"}, text)];
  return [
    make("h2", {tabindex: -1}, `${found.sure ? "" : "Looks like: "}${found.what}`),
    make("p", {}, `${form}, ${found.size} bytes`),
    make("h2", {}, "Does it verify?"), ...(verified.refused ? refused(verified) : checked(verified)).filter(Boolean),
    make("h2", {}, "Who would admit it?"), ...decided.refused ? refused(decided) : decisions(decided),
    make("h2", {}, "What is in it"), make("p", {class: "note"}, "Read, not verified."), contents(description),
  ];
}
