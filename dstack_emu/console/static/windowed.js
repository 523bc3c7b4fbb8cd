// A list of any length of which only the visible rows are in the document. Arrow keys move between the rows.

import {make} from "./dom.js";

const ROW = 30;      // pixels, as in the style sheet
const AROUND = 10;   // rows above and below what is visible
const TALLEST = 15_000_000;  // pixels that browsers scroll exactly

export class Windowed {
  // `render` makes the content of a row from an item; `open` is called with the item of a row that is chosen.
  constructor(label, render, open) {
    this._render = render;
    this._open = open;
    this._items = [];
    this._chosen = null;
    this._drawn = [];
    this._rows = make("div", {class: "rows"});
    this._space = make("div", {class: "space"}, this._rows);
    this.element = make("div", {
      class: "windowed", role: "listbox", tabindex: 0, "aria-label": label,
      onscroll: () => this._draw(), onkeydown: (event) => this._key(event), onclick: (event) => this._click(event),
    }, this._space);
    new ResizeObserver(() => this._draw()).observe(this.element);
  }

  // Shows other items, the newest last; `key` names an item. Whoever looks at the newest keeps doing so.
  show(items) {
    const list = this.element, isAtEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - ROW;
    const before = this._items[0], shift = before ? items.indexOf(before) : 0;
    this._items = items.slice(-Math.floor(TALLEST / ROW));
    this._space.style.height = `${this._items.length * ROW}px`;
    if (isAtEnd) list.scrollTop = list.scrollHeight;
    else if (shift > 0) list.scrollTop += shift * ROW;
    this._draw();
  }

  choose(item) {
    this._chosen = item;
    const at = this._items.indexOf(item) * ROW, list = this.element;
    if (at >= 0 && at < list.scrollTop) list.scrollTop = at;
    if (at >= 0 && at + ROW > list.scrollTop + list.clientHeight) list.scrollTop = at + ROW - list.clientHeight;
    this._draw();
  }

  get isAtStart() {
    return this.element.scrollTop < ROW;
  }

  _draw() {
    const list = this.element;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
    const last = Math.min(this._items.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
    const visible = this._items.slice(first, last), drawn = [first, this._items.length, this._chosen, ...visible];
    if (drawn.length === this._drawn.length && drawn.every((each, index) => each === this._drawn[index])) return;
    this._drawn = drawn;
    this._rows.style.transform = `translateY(${first * ROW}px)`;
    this._rows.replaceChildren(...visible.map((item, index) => make("div", {
      class: "item", role: "option", id: `item-${item.number}`, "data-index": first + index,
      "aria-selected": String(item === this._chosen), "aria-setsize": this._items.length, "aria-posinset": first + index + 1,
    }, this._render(item))));
    if (this._chosen && document.getElementById(`item-${this._chosen.number}`))
      list.setAttribute("aria-activedescendant", `item-${this._chosen.number}`);
    else list.removeAttribute("aria-activedescendant");
  }

  _click(event) {
    const row = event.target.closest(".item");
    if (row) this._take(Number(row.dataset.index));
  }

  _key(event) {
    const now = this._items.indexOf(this._chosen), page = Math.floor(this.element.clientHeight / ROW);
    const end = this._items.length - 1, from = now < 0 ? end + 1 : now;
    const to = {ArrowUp: from - 1, ArrowDown: now < 0 ? end : from + 1, PageUp: from - page, PageDown: from + page, Home: 0, End: end}[event.key];
    if (event.key === "Enter" && now >= 0) this._open(this._chosen, true);
    else if (to !== undefined && end >= 0) this._take(Math.max(0, Math.min(end, to)));
    else return;
    event.preventDefault();
  }

  _take(index) {
    this.choose(this._items[index]);
    this._open(this._chosen, false);
  }
}
