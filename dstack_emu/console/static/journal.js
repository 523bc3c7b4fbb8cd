// What the console keeps of the journal: a line for each call from outside, and the last call from each part to each
// other one. Both are bounded; a whole record is requested from the stack when it is looked at.

import {get, stream} from "./api.js";
import {clipped} from "./dom.js";

export const MOST = 100_000;  // lines; older ones are dropped
const DROPPED = 1_000;        // at a time, when there are more
const FIRST = 500;            // records that are requested at the start
const DISORDER = 100;         // calls that were in progress at once
const MISSED = 2_000;         // records that are requested after a time without connection: what a stack keeps
const PAUSE = 2_000;          // milliseconds before the next try to connect
const SHORTEST = 200;         // milliseconds between two announcements of changes: drawing takes longer than reading
const SHOWN = 300;            // characters of a result that a line keeps

export function number(entry) {
  return Number(entry.id.split(".")[0]);
}

export function* flattened(record) {
  yield record;
  for (const inner of record.inner ?? []) yield* flattened(inner);
}

// What came of a call, in a few words.
export function result(record) {
  const {decision, verdict, fault} = record;
  let text = record.outcome === "unanswered" ? "no answer" : String(record.grpc ?? record.status);
  if (decision) text = decision.allowed === true ? "allowed" : `denied: ${decision.reason || "no reason given"}`;
  else if (verdict) text = verdict.is_valid ? "valid" : `not valid: ${verdict.reason}`;
  else if (record.error) text = record.status === null ? record.error : `${record.grpc ?? record.status} ${record.error}`;
  return fault ? `${text} (fault ${fault.id}: ${fault.kind})` : text;
}

// The worst that happened in a record: a call that was answered may have met a refusal inside.
function worst(calls) {
  const outcomes = new Set(calls.map((each) => each.outcome));
  return ["denied", "refused", "unanswered"].find((outcome) => outcomes.has(outcome)) ?? "ok";
}

class Journal {
  constructor() {
    this.entries = [];       // lines, oldest first
    this.edges = new Map();  // "caller service" to the last call between the two
    this.position = 0;
    this.version = 0;        // grows with every change
    this.dropped = false;
    this.lost = 0;           // calls that are missing here, because the stack had no more of them when they were read
    this.names = new Set();  // every service and caller so far
    this._texts = new Map();
    this._listeners = new Set();
    this._connection = () => {};
    this._scheduled = false;
    this._announced = 0;
    this._reading = new AbortController();
  }

  // Calls the listener after changes, at most five times a second; returns what ends that.
  onChange(listener) {
    this._listeners.add(listener);
    return () => this._listeners.delete(listener);
  }

  onConnection(listener) {
    this._connection = listener;
  }

  // Keeps up with the stack for as long as the page is open.
  async start() {
    // A browser freezes a page in the background, and a stream that was read then may say nothing any more.
    document.addEventListener("resume", () => this._reading.abort());
    addEventListener("pageshow", (event) => event.persisted && this._reading.abort());
    for (;;) {
      this._reading = new AbortController();
      try {
        await this._follow();
      } catch (error) {
        if (this._reading.signal.aborted) continue;
        this._connection(`not connected: ${error.message}`);
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }

  async _follow() {
    const query = this.position ? `since=${Math.max(0, this.position - DISORDER)}&limit=${MISSED}` : `limit=${FIRST}`;
    const known = await get(`/journal?${query}`);
    const times = new Map(this.entries.slice(-2 * FIRST).map((line) => [line.number, line.time]));
    const isOther = (record) => times.has(number(record)) && times.get(number(record)) !== record.time;
    if (known.position < this.position || known.records.some(isOther)) {  // a stack that began anew
      this._clear();
      return this._follow();
    }
    if (this.position && known.records.length) this.lost += Math.max(0, number(known.records[0]) - this.position - 1);
    const seen = new Set(times.keys());
    const add = (record) => {
      if (!seen.has(number(record))) this._add(record);
    };
    known.records.forEach(add);
    known.records.forEach((record) => seen.add(number(record)));
    this.position = Math.max(this.position, known.position);
    this.version += 1;
    this._announce();
    // Calls end in another order than they begin: one that began before the others may have ended meanwhile.
    const records = await stream(Math.max(0, known.position - DISORDER), this._reading.signal);
    this._connected();
    let repeats = known.records.length > 0;  // the stream begins with a known record, if the stack still has it
    for await (const record of records) {
      if ("rewound_to" in record) {
        this._rewind(record.rewound_to);
        seen.clear();
      } else if ("lost" in record) {
        this.lost += record.lost;
        this._connected();
      } else {
        if (repeats && number(record) > this.position + 1) {
          this.lost += number(record) - this.position - 1;
          this._connected();
        }
        add(record);
      }
      repeats = false;
      this._changed();
    }
    this._connection("not connected: the stack has ended");
  }

  _connected() {
    this._connection(this.lost ? `connected; ${this.lost} calls were missed` : "connected");
  }

  _clear() {
    this.entries = [];
    this.lost = 0;
    this.dropped = false;
    this.edges.clear();
    this.position = 0;
  }

  _rewind(position) {
    this.entries = this.entries.filter((line) => line.number <= position);
    for (const [key, edge] of this.edges) if (edge.number > position) this.edges.delete(key);
    this.position = position;
  }

  _add(record) {
    this.position = Math.max(this.position, number(record));
    this.entries.push(this._line(record));
    for (const each of flattened(record)) if (each.call) this._connect(each);
    if (this.entries.length > MOST + DROPPED) {
      this.entries.splice(0, this.entries.length - MOST);
      this.dropped = true;
    }
  }

  // Adds older records before the oldest line, and returns whether there may be more.
  async loadOlder(limit) {
    if (this.entries.length >= MOST) return false;
    const first = this.entries[0]?.number ?? this.position + 1;
    // Calls end in another order than they begin, so some of those before the first line have a higher number.
    const {records} = await get(`/journal?limit=${limit}&before=${first + DISORDER}`);
    const known = new Set(this.entries.slice(0, 10 * DISORDER).map((line) => line.number));
    const older = records.filter((record) => !known.has(number(record)));
    this.entries = [...older.map((record) => this._line(record)), ...this.entries];
    this._changed();
    return older.length > 0;
  }

  _connect(record) {
    this.edges.set(`${record.caller} ${record.service}`, {
      caller: record.caller, service: record.service, call: record.call, outcome: record.outcome,
      text: this._result(record), time: record.time, number: this.position,
    });
  }

  _line(record) {
    const calls = [...flattened(record)].filter((each) => each.call);
    for (const each of calls) this.names.add(each.service).add(each.caller);
    const asked = calls.flatMap((each) => each.decision?.asked?.app_id ?? each.verdict?.app_id ?? []);
    const all = (name) => this._shared(` ${[...new Set(calls.map((each) => each[name]))].join(" ")} `);
    return {
      number: number(record), time: record.time, ms: record.ms, outcome: record.outcome, worst: worst(calls),
      caller: this._shared(record.caller), service: this._shared(record.service), call: this._shared(record.call),
      text: this._shared(this._result(record)), services: all("service"), callers: all("caller"), names: all("call"),
      apps: this._shared(` ${[...new Set(asked)].join(" ")} `),
    };
  }

  _result(record) {
    return clipped(result(record), SHOWN);
  }

  // Equal texts are kept once: a journal repeats itself.
  _shared(text) {
    if (this._texts.size > 5_000) this._texts.clear();
    const kept = this._texts.get(text);
    if (kept === undefined) this._texts.set(text, text);
    return kept ?? text;
  }

  _announce() {
    this._scheduled = false;
    this._announced = performance.now();
    for (const listener of this._listeners) listener();
  }

  _changed() {
    this.version += 1;
    if (this._scheduled) return;
    this._scheduled = true;
    const wait = Math.max(0, this._announced + SHORTEST - performance.now());
    setTimeout(() => requestAnimationFrame(() => this._announce()), wait);
  }
}

export const journal = new Journal();
