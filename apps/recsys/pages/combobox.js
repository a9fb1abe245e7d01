// An input with suggestions, after the combobox pattern of the ARIA practices.

import { make } from "./dom.js";

const TYPING_MS = 80;

/** An input with suggestions: arrows, Enter, Escape, pointer. `find` returns what there is, `take` gets the chosen. */
export function combobox(input, list, { find, row, take, typed, emptied, failed }) {
  let found = [], active = -1, timer = null, asked = 0;

  function open(yes) {
    list.hidden = !yes;
    input.setAttribute("aria-expanded", String(yes));
    if (!yes) mark(-1);
  }

  function mark(place) {
    active = place;
    [...list.children].forEach((option, index) => option.role === "option" && option.setAttribute("aria-selected", String(index === place)));
    if (place < 0) { input.removeAttribute("aria-activedescendant"); return; }
    input.setAttribute("aria-activedescendant", list.children[place].id);
    list.children[place].scrollIntoView({ block: "nearest" });
  }

  function say(text) {
    found = [];
    const line = make("li", "said", text);
    line.role = "presentation";
    list.replaceChildren(line);
    open(true);
  }

  function choose(value) {
    close();
    take(value);
  }

  function close() {
    clearTimeout(timer);
    asked += 1;
    open(false);
  }

  async function suggest() {
    const mine = ++asked, text = input.value.trim();
    const slow = setTimeout(() => mine === asked && say("Searching…"), 250);
    try {
      const values = await find([...text].slice(0, 100).join(""));
      if (mine !== asked || document.activeElement !== input) return;
      if (!values.length) { say("Nothing found"); return; }
      const marked = JSON.stringify(found[active]);
      found = values;
      list.dataset.query = text;
      list.replaceChildren(...values.map((value, index) => {
        const option = make("li", "", ...row(value));
        option.role = "option";
        option.id = `${list.id}-${index}`;
        option.addEventListener("pointerdown", (event) => event.preventDefault()); // the input keeps the focus
        option.addEventListener("click", () => choose(value));
        return option;
      }));
      open(true);
      mark(values.findIndex((value) => JSON.stringify(value) === marked)); // whoever has moved already stays there
    } catch (error) {
      if (mine !== asked || error.stale) return;
      if (error.status === 401) { close(); failed(error, () => {}); } else say(`No suggestions: ${error.message}`);
    } finally {
      clearTimeout(slow);
    }
  }

  const soon = (delay) => { clearTimeout(timer); timer = setTimeout(suggest, delay); };
  input.addEventListener("input", () => soon(TYPING_MS));
  input.addEventListener("focus", () => { input.select(); soon(0); });
  input.addEventListener("click", () => list.hidden && soon(0));
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const last = found.length - 1;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) soon(0);
      else if (last >= 0) mark(event.key === "ArrowDown" ? (active >= last ? 0 : active + 1) : (active <= 0 ? last : active - 1));
    } else if (event.key === "Enter") {
      event.preventDefault();
      const value = active >= 0 ? found[active] : null;
      if (value !== null) choose(value);
      else if (input.value.trim()) { close(); typed(input.value.trim()); }
    } else if (event.key === "Escape") {
      if (!list.hidden) { event.preventDefault(); close(); } else input.value = "";
    } else if (event.key === "Backspace" && !input.value) {
      emptied?.();
    }
  });
}
