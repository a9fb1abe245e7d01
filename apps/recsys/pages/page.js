// The page to try a served recommender: pick a user or compose a history, see the answer beside what they had.
// Everything that comes from the service is put in as text, never as markup.
import { combobox } from "./combobox.js";
import { $, count, cut, data, make, nameOf, number } from "./dom.js";
import { Failure, abandon, call, kept } from "./service.js";

const SUGGESTIONS = 8, READY = 4, MAX_K = 1000, MAX_RETRIES = 3;
const SOURCES = { user: "for this user", history: "from the history", popular: "what is popular" };
const state = { mode: "user", user: null, history: [], segment: {}, k: 10, category: "", clicked: {} };
let about = null, first = true, stores = true, retrying = null, retries = 0;

const save = () => kept.set("kd-state", JSON.stringify(state));

function restore() {
  try {
    const old = JSON.parse(kept.get("kd-state"));
    for (const name of Object.keys(state)) if (typeof old?.[name] === typeof state[name] || name === "user") state[name] = old?.[name] ?? state[name];
  } catch { /* not ours: begin anew */ }
}

/** Show what went wrong and how to go on; a service that says when to come back is asked again then. */
function failed(error, again) {
  if (!(error instanceof Failure)) { error = new Failure(`The page failed: ${error.message}`); }
  if (error.stale) return;
  if (error.status === 401) { wantKey(again); return; }
  clearInterval(retrying);
  $("problem-text").textContent = error.message;
  $("problem").hidden = false;
  const retry = $("problem-retry");
  const go = () => { settled(); again(); };
  retry.hidden = error.status >= 400 && error.status < 500 && error.status !== 429;
  retry.textContent = "Try again";
  retry.onclick = () => { retries = 0; go(); };
  if (error.wait !== null && !retry.hidden && retries < MAX_RETRIES) {
    let left = error.wait;
    const tell = () => { retry.textContent = `Try again (${left} s)`; };
    tell();
    retrying = setInterval(() => {
      left -= 1;
      if (left > 0) { tell(); return; }
      retries += 1;
      go();
    }, 1000);
  }
}

function settled() {
  clearInterval(retrying);
  $("problem").hidden = true;
}

// -- API key ---------------------------------------------------------------------------------------------------------

let afterKey = new Set();

function wantKey(again) {
  afterKey.add(again);
  const refused = kept.get("kd-key") !== null;
  if (!$("key-form").hidden && !refused) return;
  kept.set("kd-key", null);
  $("forget-key").hidden = true;
  if (about === null) $("facts").textContent = "Waiting for an API key";
  $("key-note").textContent = refused
    ? "The service does not accept that key. Is it whole, and meant for this service?"
    : "It is kept in this tab until you close it, and sent as a header, never in an address.";
  $("key-form").hidden = false;
  $("key-input").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key-input").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    $("key-note").textContent = "A key is made of letters, digits and signs, without spaces.";
    return;
  }
  kept.set("kd-key", key);
  $("key-input").value = "";
  $("key-form").hidden = true;
  $("forget-key").hidden = false;
  const waiting = afterKey;
  afterKey = new Set();
  settled();
  for (const again of waiting) again();
});

$("forget-key").addEventListener("click", () => {
  kept.set("kd-key", null);
  wantKey(start);
});

// -- suggestions -----------------------------------------------------------------------------------------------------

const userRow = (user) => [data(user.user_id), make("small", "", count(user.interactions, "item", "items"))];
const itemRow = (item) => [data(nameOf(item)), make("small", "", item.title ? data(item.item_id) : "no title")];
const look = async (what, query, limit, lane = `suggest-${what}`) =>
  (await call(lane, `v1/${what}?${new URLSearchParams({ query, limit })}`))[what];

combobox($("user-input"), $("user-list"), {
  failed,
  find: (text) => look("users", text === state.user ? "" : text, SUGGESTIONS),
  row: userRow,
  take: (user) => pickUser(user.user_id),
  typed: (text) => pickUser(text),
});
combobox($("item-input"), $("item-list"), {
  failed,
  find: async (text) => {
    const had = new Set(state.history.map((item) => item.item_id));
    return (await look("items", text, SUGGESTIONS + Math.min(had.size, 50))).filter((item) => !had.has(item.item_id)).slice(0, SUGGESTIONS);
  },
  row: itemRow,
  take: addItem,
  typed: (text) => addItem({ item_id: text }),
  emptied: () => state.history.length && removeItem(state.history.length - 1),
});

// -- what is asked ---------------------------------------------------------------------------------------------------

function pickUser(user, event) {
  state.user = user;
  $("user-input").value = user;
  ask(event);
}

function addItem(item, event) {
  $("item-input").value = "";
  if (!state.history.some((each) => each.item_id === item.item_id)) state.history.push({ item_id: item.item_id, title: item.title });
  showChips();
  ask(event);
}

function removeItem(place) {
  state.history.splice(place, 1);
  showChips();
  ask();
}

function showChips() {
  $("chips").replaceChildren(...state.history.map((item, place) => {
    const remove = make("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${cut(nameOf(item), 80)}`);
    remove.addEventListener("click", () => { removeItem(place); $("item-input").focus(); });
    const name = data(nameOf(item));
    name.title = nameOf(item);
    return make("li", "", name, remove);
  }));
  showReadyItems();
}

function question() {
  const asked = { k: state.k, why: true };
  if (state.category) asked.categories = [state.category];
  if (state.mode === "user") return state.user === null ? null : { ...asked, user_id: state.user };
  if (state.mode === "history") return state.history.length ? { ...asked, history: state.history.map((item) => item.item_id) } : null;
  const segment = Object.fromEntries(Object.entries(state.segment).filter(([, value]) => value));
  return Object.keys(segment).length ? { ...asked, segment } : asked;
}

/** Ask for recommendations and show them; `event` is what the person did, from which the time is counted. */
async function ask(event) {
  const since = event?.timeStamp ?? performance.now(), again = () => ask();
  save();
  showMode();
  const asked = question();
  if (asked === null) {
    abandon("answer");
    showNothing();
    return;
  }
  $("results").setAttribute("aria-busy", "true");
  try {
    const sent = performance.now(), coming = call("answer", "v1/recommend", asked);
    showHistory(); // asked second: the answer is what is waited for
    const answer = await coming;
    const ms = performance.now() - sent;
    settled();
    retries = 0;
    showAnswer(answer, asked, ms);
    $("results").setAttribute("aria-busy", "false");
    measure(since);
    if (about && answer.model_version !== about.model_version) learned = {}; // it was reloaded
    start();
  } catch (error) {
    if (error.stale) return;
    $("results").setAttribute("aria-busy", "false");
    showNothing("There is no answer to show.");
    if (error.status === 404) hideHistory();
    failed(error, again);
  }
}

/** Say in a data attribute how long a person waited: from the click to the first frame that has the answer. */
function measure(since) {
  requestAnimationFrame(() => setTimeout(() => {
    const ms = (performance.now() - since).toFixed(1);
    $("results").dataset.answerMs = ms;
    if (first) $("results").dataset.firstAnswerMs = ms;
    first = false;
  }));
}

// -- what is shown ---------------------------------------------------------------------------------------------------

function showMode() {
  for (const mode of ["user", "history", "newcomer"]) {
    $(`panel-${mode}`).hidden = mode !== state.mode;
    document.querySelector(`input[name="mode"][value="${mode}"]`).checked = mode === state.mode;
  }
  for (const button of $("ready-users").querySelectorAll("button[data-user]")) button.setAttribute("aria-pressed", String(button.dataset.user === state.user));
}

function showNothing(text) {
  const empty = { user: "Pick a user above and see whether the recommendations make sense.", history: "Add what somebody had, and the recommendations follow every change." };
  $("items").replaceChildren();
  $("answer-facts").textContent = "";
  $("click-note").hidden = true;
  $("empty").textContent = text ?? empty[state.mode];
  $("empty").hidden = false;
  if (text === undefined) { if (about !== null) settled(); $("results").setAttribute("aria-busy", "false"); showHistory(); }
}

function showAnswer(answer, asked, ms) {
  const focused = [...$("items").children].findIndex((row) => row.contains(document.activeElement));
  const items = answer.items, scores = items.map((item) => item.score);
  const floor = Math.min(0, ...scores), span = Math.max(...scores) - floor || 1;
  const digits = scores.every(Number.isInteger) ? 0 : span < 0.1 ? 4 : span < 10 ? 3 : 2;
  $("items").replaceChildren(...items.map((item, place) => answerRow(item, place, (item.score - floor) / span, digits)));
  $("click-note").hidden = state.mode !== "user" || !stores || !items.length;
  $("empty").hidden = items.length > 0;
  $("empty").textContent = state.category ? "Nothing is left to recommend in this category." : "Nothing is left to recommend.";
  const fewer = items.length && items.length < asked.k ? ` all ${items.length} there are ·` : "";
  const time = make("span", "time", `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);
  $("answer-facts").replaceChildren(make("span", "badge", SOURCES[answer.source] ?? answer.source), `${fewer} `, time);
  $("answer-facts").title = `Measured in this browser, from asking to the whole answer; model version ${answer.model_version}`;
  $("results").dataset.source = answer.source;
  const best = items.length ? `, the first is ${cut(nameOf(items[0]), 80)}` : "";
  $("status").textContent = `${count(items.length, "recommendation", "recommendations")}${best}`;
  if (focused >= 0) ($("items").children[Math.min(focused, items.length - 1)]?.querySelector("button") ?? $("k-input")).focus();
}

function answerRow(item, place, share, digits) {
  const title = make("span", "title", data(nameOf(item))), bar = make("span", "");
  title.title = item.title ? `${item.title} · ${item.item_id}` : item.item_id;
  bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const track = make("span", "track", bar);
  track.setAttribute("aria-hidden", "true");
  const score = make("span", "score", track, make("span", "number", item.score.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })));
  score.title = `Score ${item.score}`;
  const row = make("li", "", make("span", "rank", String(place + 1)), title, score);
  row.dataset.item = item.item_id;
  const near = (item.why ?? []).filter((each) => each.similarity > 0);
  if (near.length) {
    const parts = near.flatMap((each, index) => [...(index ? ["\u00a0· "] : []), data(cut(nameOf(each), 120))]);
    const why = make("span", "why", "near in the history: ", ...parts);
    why.title = near.map((each) => `${nameOf(each)}: ${Math.round(each.similarity * 100)} % alike`).join("\n");
    row.append(why);
    const ids = new Set(near.map((each) => each.item_id));
    for (const [type, on] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]])
      row.addEventListener(type, () => pointOut(on ? ids : new Set()));
  }
  if (state.mode === "user" && stores) row.append(clickButton(item));
  return row;
}

/** Mark items of the history, and bring the first of them into its list's view. */
function pointOut(ids) {
  const list = $("history-items"), marked = [...list.children].filter((row) => {
    row.classList.toggle("near", ids.has(row.dataset.item));
    return ids.has(row.dataset.item);
  });
  if (!marked.length) return;
  const top = marked[0].offsetTop, seen = Math.min(list.clientHeight, window.innerHeight - list.getBoundingClientRect().top);
  if (top < list.scrollTop || top > list.scrollTop + seen - 40) list.scrollTop = top - 40;
}

// -- events ----------------------------------------------------------------------------------------------------------

function clickButton(item) {
  const button = make("button", "clicked", "Clicked"), user = state.user;
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  button.type = "button";
  button.title = "The user clicked this: store it, and recommend anew";
  button.setAttribute("aria-label", `User ${cut(user, 40)} clicked ${cut(nameOf(item), 80)}`);
  const store = async () => {
    button.disabled = true;
    button.textContent = "Storing…";
    try {
      // sent again it has the same id, so it is stored once
      await call(`event-${id}`, "v1/events", { events: [{ user_id: user, item_id: item.item_id, kind: "click", event_id: id }] });
      const own = new Map(Object.entries(state.clicked)).get(user) ?? [];
      state.clicked = Object.fromEntries([...Object.entries(state.clicked), [user, [{ item_id: item.item_id, title: item.title }, ...own]]]);
      save();
      if (state.mode === "user" && state.user === user) await ask();
      $("status").textContent = `Stored: the user clicked ${cut(nameOf(item), 80)}`;
    } catch (error) {
      button.disabled = false;
      button.textContent = "Clicked";
      failed(error, store);
    }
  };
  button.addEventListener("click", store);
  return button;
}

// -- the history beside the answer -----------------------------------------------------------------------------------

async function showHistory() {
  const user = state.user;
  if (!(state.mode === "user" ? user !== null : state.mode === "history" && state.history.length)) { hideHistory(); return; }
  $("history").hidden = false;
  document.querySelector(".columns").classList.add("two");
  if (state.mode === "history") {
    abandon("history");
    listHistory("What this person had", [...state.history].reverse(), []);
    return;
  }
  const clicked = new Map(Object.entries(state.clicked)).get(user) ?? [];
  if ($("history").dataset.user !== user) listHistory(["User ", data(user)], [], [], "…");
  try {
    const had = (await call("history", `v1/history?user_id=${encodeURIComponent(user)}`)).history;
    listHistory(["What ", data(user), " had last"], had, clicked);
    $("history").dataset.user = user;
  } catch (error) {
    if (error.stale) return;
    if (error.status === 401) { failed(error, showHistory); return; }
    listHistory(["User ", data(user)], [], clicked, error.status === 404 ? "The model's data have no items of this user." : error.message);
  }
}

function hideHistory() {
  abandon("history");
  $("history").hidden = true;
  document.querySelector(".columns").classList.remove("two");
}

function listHistory(heading, items, clicked, note) {
  // the service lists stored events as well; one of an item it does not know is shown all the same
  const known = new Set(items.map((item) => item.item_id)), fresh = new Set(clicked.map((item) => item.item_id));
  const rows = [...clicked.filter((item) => !known.has(item.item_id)), ...items].map((item) => [item, fresh.has(item.item_id)]);
  $("history-title").replaceChildren(...[heading].flat());
  $("history-facts").textContent = rows.length ? "newest first" : "";
  $("history-note").textContent = note ?? "Nothing.";
  $("history-note").hidden = rows.length > 0;
  $("history-items").hidden = rows.length === 0;
  delete $("history").dataset.user;
  $("history-items").replaceChildren(...rows.map(([item, fresh]) => {
    const row = make("li", "", data(nameOf(item)));
    row.title = nameOf(item);
    row.dataset.item = item.item_id;
    if (fresh) row.append(make("small", "", "clicked here"));
    return row;
  }));
}

// -- the beginning ---------------------------------------------------------------------------------------------------

function showModel() {
  const facts = [about.label, `${count(about.items, "item", "items")}, ${count(about.users, "user", "users")}`, `${about.index.kind} index`, `version ${about.model_version}`];
  $("facts").textContent = facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join("\u00a0· ");
  $("simulated").hidden = !about.data.simulated;
  stores = about.events;
  if (!stores) {
    // an answer may have come before this was known
    for (const button of document.querySelectorAll(".clicked")) button.remove();
    $("click-note").hidden = true;
  }
  const chosen = state.category, names = about.categories.names;
  state.category = names.includes(chosen) ? chosen : "";
  options($("category-input"), "All", names, state.category);
  $("category-field").hidden = names.length === 0;
  const segments = Object.entries(about.segments);
  $("newcomer-note").textContent = segments.length ? "Somebody without a history gets what is popular, among people like them if you say who they are." : "Somebody without a history gets what is popular.";
  $("segments").replaceChildren(...segments.map(([feature, values], place) => {
    const select = make("select", ""), label = make("label", "", data(feature));
    select.id = `segment-${place}`;
    label.htmlFor = select.id;
    if (!values.includes(state.segment[feature])) delete state.segment[feature];
    options(select, "Anybody", values, state.segment[feature] ?? "");
    select.addEventListener("change", (event) => { state.segment = { ...state.segment, [feature]: select.value }; ask(event); });
    return make("div", "field", label, select);
  }));
  const measured = about.metrics[0]?.metrics ?? {};
  const rows = [
    ["Model", `${about.label} (${about.kind}, ${about.role})`],
    ["Data", `${about.data.name}${about.data.simulated ? " (simulated)" : ""}, ${count(about.data.interactions, "interaction", "interactions")}`],
    ["Size", `${count(about.parameters, "parameter", "parameters")}${about.dimension ? `, ${about.dimension} numbers an item` : ""}`],
    ["Index", about.index.recall === undefined ? about.index.kind : `${about.index.kind}, finds ${number(about.index.recall * 100)} % of the ten best`],
    ["Held-out test", Object.entries(measured).filter(([name]) => /^(ndcg|recall|coverage)@/.test(name)).map(([name, value]) => `${name} ${value.toFixed(3)}`).join(", ")],
    ["Recipe", about.recipe ?? ""],
    ["Clicks", stores ? "" : "not remembered: this service stores no events"],
  ];
  $("about-list").replaceChildren(...rows.filter(([, text]) => text).flatMap(([name, text]) => [make("dt", "", name), make("dd", "", text)]));
  $("about").hidden = false;
}

function options(select, none, values, chosen) {
  select.replaceChildren(...["", ...values].map((value) => {
    const option = make("option", "", value || none);
    option.value = value;
    option.selected = value === chosen;
    return option;
  }));
}

let readyUsers = [], readyItems = [];

function showReadyUsers() {
  const ordered = [...readyUsers].sort((a, b) => a.interactions - b.interactions), n = ordered.length;
  // short histories and long ones
  const places = new Set(Array.from({ length: Math.min(READY, n) }, (_, i) => Math.round(((i + 0.5) * (n - 1)) / Math.min(READY, n))));
  const buttons = [...places].map((place) => ready(userRow(ordered[place]), (event) => pickUser(ordered[place].user_id, event), ordered[place].user_id));
  const other = ready(["Another"], (event) => pickUser(readyUsers[Math.floor(Math.random() * n)].user_id, event));
  other.classList.add("other");
  $("ready-users").replaceChildren(...(n > READY ? [...buttons, other] : buttons));
  showMode();
}

function showReadyItems() {
  const had = new Set(state.history.map((item) => item.item_id));
  const open = readyItems.filter((item) => !had.has(item.item_id)).slice(0, READY);
  $("ready-items").replaceChildren(...open.map((item) => ready(["+", data(nameOf(item))], (event) => addItem(item, event))));
}

function ready(children, act, user) {
  const button = make("button", "", ...children);
  button.type = "button";
  if (user !== undefined) { button.dataset.user = user; button.title = user; }
  button.addEventListener("click", act);
  return button;
}

// what was learned of the model; what is missing is asked again
let learned = {};

/** Learn what is served and whom to begin with. */
async function start() {
  const wanted = [
    ["about", () => call("model", "v1/model"), (found) => { about = found; showModel(); }],
    ["users", () => look("users", "", 100, "ready-users"), (found) => { readyUsers = found; showReadyUsers(); }],
    ["items", () => look("items", "", READY * 6, "ready-items"), (found) => { readyItems = found; showReadyItems(); }],
  ];
  const mine = learned, missing = wanted.filter(([name]) => !(name in mine));
  const results = await Promise.allSettled(missing.map(async ([name, get, show]) => {
    const found = await get();
    mine[name] = true;
    show(found);
  }));
  const error = results.find((result) => result.status === "rejected" && !result.reason.stale)?.reason;
  if (error === undefined) return;
  if (about === null && error.status !== 401) $("facts").textContent = "The model is not known yet.";
  failed(error, start);
}

for (const radio of document.querySelectorAll('input[name="mode"]')) {
  radio.addEventListener("change", (event) => { state.mode = radio.value; ask(event); });
}
$("k-input").addEventListener("change", (event) => {
  const wanted = Math.round(Number($("k-input").value));
  state.k = Math.min(MAX_K, Math.max(1, Number.isFinite(wanted) ? wanted : 10));
  $("k-input").value = state.k;
  ask(event);
});
$("category-input").addEventListener("change", (event) => { state.category = $("category-input").value; ask(event); });

restore();
$("k-input").value = state.k;
$("user-input").value = state.user ?? "";
$("forget-key").hidden = kept.get("kd-key") === null;
showChips();
start();
ask();
