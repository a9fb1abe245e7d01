// Asking the service, and what this tab keeps.

const SECONDS = 15;

/** What this tab keeps; where the browser keeps nothing, the page works until it is left. */
export const kept = {
  get(name) {
    try { return sessionStorage.getItem(name) ?? kept[`_${name}`] ?? null; } catch { return kept[`_${name}`] ?? null; }
  },
  set(name, value) {
    kept[`_${name}`] = value;
    try { if (value === null) sessionStorage.removeItem(name); else sessionStorage.setItem(name, value); } catch { /* as above */ }
  },
};

export class Failure extends Error {
  constructor(message, { status = 0, stale = false, wait = null } = {}) {
    super(message);
    Object.assign(this, { status, stale, wait });
  }
}

const lanes = new Map();

/** Give up the question asked in a lane. */
export const abandon = (lane) => lanes.get(lane)?.abort("stale");

/** Ask the service; a newer question in the same lane ends an older one, whose Failure is then stale. */
export async function call(lane, path, body) {
  abandon(lane);
  const control = new AbortController();
  lanes.set(lane, control);
  const timer = setTimeout(() => control.abort("late"), SECONDS * 1000);
  const headers = { accept: "application/json" }, key = kept.get("kd-key");
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  try {
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST", body: body === undefined ? undefined : JSON.stringify(body),
      headers, signal: control.signal, cache: "no-store", credentials: "omit", redirect: "error",
    });
    const text = await response.text();
    if (control.signal.aborted) throw control.signal.reason;
    return understood(response, text);
  } catch (error) {
    if (error instanceof Failure) throw error;
    if (control.signal.reason === "stale") throw new Failure("a newer question was asked", { stale: true });
    if (control.signal.reason === "late") throw new Failure(`The service did not answer within ${SECONDS} seconds.`);
    throw new Failure("The service cannot be reached. Is it still running?");
  } finally {
    clearTimeout(timer);
  }
}

/** Return the JSON of an answer; ids stay text, for a JavaScript number does not hold every 64-bit id. */
function understood(response, text) {
  let content = null;
  try { content = JSON.parse(text.replace(/"item_id":(-?\d+)/g, '"item_id":"$1"')); } catch { /* said below */ }
  if (response.ok && content !== null) return content;
  const said = content?.error?.message, wait = Number.parseFloat(response.headers.get("retry-after"));
  const busy = response.status === 429 ? "Too many requests" : "The service cannot answer now";
  let message = said ? `${said[0].toUpperCase()}${said.slice(1)}.` : `The service answered ${response.status} without saying why.`;
  if (response.status === 429 || response.status === 503) message = said ? `${busy}: ${said}.` : `${busy} (${response.status}).`;
  throw new Failure(message, { status: response.status, wait: Number.isFinite(wait) ? Math.max(1, Math.ceil(wait)) : null });
}
