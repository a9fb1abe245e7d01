// Making what the page shows: everything that comes from the service is put in as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children); // a string becomes a text node
  return node;
}

/** Text of the data, kept apart from the direction of what surrounds it. */
export function data(text) {
  const node = make("bdi", "", text);
  node.dir = "auto";
  return node;
}

export const nameOf = (item) => item.title || item.item_id;
export const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
export const cut = (text, most) => ([...text].length > most ? `${[...text].slice(0, most).join("")}…` : text);
export const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
