// The page of calls: a live list of the calls from outside, and of each one what it led to.

import {get} from "./api.js";
import {alertBox, attempt, choice, draw, facts, labelled, make, scrolling, unseenStatus, whole} from "./dom.js";
import {denial} from "./denial.js";
import {flattened, journal, result} from "./journal.js";
import {evidenceOf} from "./links.js";
import {toKeep} from "./pictures.js";
import {Windowed} from "./windowed.js";

const OLDER = 1_000;  // records that are requested at once
const SHAPES = new Set(["line", "path", "rect", "text"]);

// A filter as a predicate over lines of the journal. Words match anywhere in a name, without regard to case.
function predicate({service, call, outcome, app}) {
  const named = service && ` ${service} `, words = call.trim().toLowerCase(), id = app.trim().toLowerCase().replace(/^0x/, "");
  return (line) => (!named || line.services.includes(named) || line.callers.includes(named)) &&
    (!words || line.names.toLowerCase().includes(words)) && (!outcome || line.worst === outcome || line.outcome === outcome) &&
    (!id || line.apps.includes(id));
}

function row(line) {
  return [
    make("span", {class: "number"}, String(line.number)), make("span", {class: "time"}, line.time.slice(11, 23)),
    make("span", {class: "what"}, `${line.caller} → ${line.service} ${line.call}`),
    make("span", {class: `came ${line.worst}`}, line.worst === "ok" || line.worst === line.outcome ? line.text : `${line.text} (${line.worst} inside)`),
    make("span", {class: "took"}, line.ms === null ? "" : `${line.ms} ms`),
  ];
}

function filters(change) {
  const fields = {
    service: choice([""], ""), call: make("input", {type: "search", autocomplete: "off"}),
    outcome: choice(["", "ok", "denied", "refused", "unanswered"], ""), app: make("input", {type: "search", autocomplete: "off"}),
  };
  const names = {service: "Service or caller", call: "RPC or path", outcome: "What came of it", app: "App id"};
  const form = make("form", {class: "row", role: "search", "aria-label": "Filters", onsubmit: (event) => event.preventDefault(), oninput: change},
    Object.entries(fields).map(([name, field]) => labelled(names[name], `filter-${name}`, field)),
    make("button", {type: "button", onclick: () => { form.reset(); change(); }}, "Show all"));
  return {form, fields, values: () => Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]))};
}

export async function show(content, [chosen]) {
  const details = make("section", {"aria-label": "The call"}), count = make("p", {class: "note"});
  const list = new Windowed("Calls, the newest last", row, (line, focus) => open(String(line.number), focus));
  const found = unseenStatus(), alert = alertBox();
  // Calls arrive all the time: what is found is said only when somebody has asked for something else.
  const filter = filters(() => {
    redraw();
    found.textContent = count.textContent;
  });
  let turn = 0, offered = 0, closed = false;

  const older = make("button", {onclick: (event) => attempt(alert, event.currentTarget, async () => {
    older.hidden = !await journal.loadOlder(OLDER);
  })}, "Load older calls");
  content.append(filter.form, found, make("div", {class: "row"}, count, older), alert, list.element, details);

  function redraw() {
    const wanted = filter.values(), isFiltered = Object.values(wanted).some((each) => each.trim());
    const lines = isFiltered ? journal.entries.filter(predicate(wanted)) : journal.entries;
    list.show(lines);
    const held = journal.entries.length;
    count.textContent = `${lines.length} of ${held} calls${journal.dropped ? "; older ones were dropped here" : ""}` +
      (journal.lost ? `; ${journal.lost} are missing: this page read more slowly than calls ended` : "");
  }

  // Names that appear later are offered, too.
  function offer() {
    if (journal.names.size === offered) return;
    offered = journal.names.size;
    const names = [...journal.names].sort();
    const {service} = filter.fields, value = service.value;
    // The present choice stays, also while its list is open: options are only added, in their places.
    for (const name of names) {
      const after = [...service.options].find((option) => option.value > name) ?? null;
      if (![...service.options].some((option) => option.value === name)) service.insertBefore(make("option", {value: name}, name), after);
    }
    service.value = value;
  }

  async function open(id, focus) {
    const own = ++turn;
    history.replaceState(null, "", `#/calls/${id}`);
    const problem = alertBox(), body = make("div");
    await attempt(problem, null, async () => {
      const [record, diagram, why] = await Promise.all(["", "/diagram", "/why"].map((rest) => get(`/journal/${id}${rest}`)));
      if (turn === own) body.append(...described(record, diagram, why));
    });
    if (turn !== own || closed) return;
    details.replaceChildren(make("div", {class: "card"}, make("h2", {tabindex: -1}, `Call ${id}`), problem, body));
    if (focus) details.querySelector("h2").focus();
  }

  redraw();
  offer();
  const unfollow = journal.onChange(redraw), offering = setInterval(offer, 2_000);
  if (/^\d+$/.test(chosen ?? "")) {
    await open(chosen, false);
    list.choose(journal.entries.find((line) => line.number === Number(chosen)) ?? null);
  }
  return () => {
    closed = true;
    unfollow();
    clearInterval(offering);
  };
}

// What a call is: what refused it first, then the picture, then every step as text.
function described(record, diagram, why) {
  return [
    make("p", {}, `${record.time}: ${record.caller} → ${record.service} ${record.call}`),
    make("p", {class: record.outcome}, whole(result(record))),
    ...why.denials.map((each) => denial(each)),
    scrolling("Sequence diagram", sequence(diagram)),
    toKeep(record.id),
    evidenceOf(record),
    make("details", {}, make("summary", {}, "Every step as text"), steps(record)),
    make("details", {}, make("summary", {}, "The record"), facts(record)),
  ];
}

// The stack's shapes as elements of SVG, of four kinds and with texts that stay texts.
function sequence({label, width, height, shapes}) {
  return draw("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label},
    shapes.filter(({tag}) => SHAPES.has(tag)).map(({tag, attributes, text, title}) =>
      draw(tag, attributes, title ? draw("title", {}, title) : null, text)));
}

function steps(record) {
  const text = (each) => each.call ? `${each.caller} → ${each.service} ${each.call}: ${result(each)}` : `evidence ${each.attestation ?? "not verified"} ${each.tcb_status ?? each.error ?? ""}`;
  return make("ol", {}, [...flattened(record)].map((each) =>
    make("li", {class: each.outcome ?? (each.attestation === "refused" ? "refused" : null)}, whole(text(each)), each.ms ? ` (${each.ms} ms)` : "")));
}
