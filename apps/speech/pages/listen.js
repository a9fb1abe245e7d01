// Transcribes from the microphone while one speaks. Whatever the service says is put in as text, never as markup.

import { Downsampler, RATE, decibels } from "/listen-audio.js";

const $ = (id) => document.getElementById(id);
// what may wait in the browser before audio is left out: 10 s
const MOST_WAITING = 10 * RATE * 2;

let session = null;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  return `${Math.floor(tenths / 600)}:${String((tenths / 10 % 60).toFixed(1)).padStart(4, "0")}`;
}

function add(message) {
  const line = document.createElement("li");
  const time = document.createElement("time");
  const words = document.createElement("span");
  time.textContent = clock(message.start);
  words.textContent = message.text;
  words.dir = "auto";
  line.append(time, words);
  $("final").append(line);
  $("copy").disabled = $("clear").disabled = false;
}

/** One stretch of listening: microphone, what makes samples of it, and the connection. */
class Session {
  constructor() {
    this.sent = 0; // samples
    this.sentAt = []; // [samples so far, when], to know how old what was heard is
    this.over = false;
  }

  /** Open microphone and connection; where it was stopped meanwhile, close what stop() did not find. */
  async begin() {
    this.media = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    if (this.over) {
      this.release();
      return;
    }
    for (const track of this.media.getAudioTracks()) track.onended = () => this.stop("The microphone has gone.");
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("/listen-worklet.js");
    if (this.over) {
      this.release();
      return;
    }
    this.downsampler = new Downsampler(this.context.sampleRate);
    this.node = new AudioWorkletNode(this.context, "microphone", { numberOfOutputs: 0 });
    const address = new URL(`/v1/listen?rate=${RATE}`, location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(address);
    this.socket.onmessage = (event) => this.take(JSON.parse(event.data));
    this.socket.onclose = (event) => this.closed(event);
    await new Promise((done, failed) => {
      this.socket.onopen = done;
      this.socket.onerror = () => failed(new Error("The service cannot be reached."));
    });
    if (this.over) {
      this.release();
      this.socket.close();
      return;
    }
    this.node.port.onmessage = (event) => this.send(event.data);
    this.context.createMediaStreamSource(this.media).connect(this.node);
  }

  send(block) {
    $("level").value = Math.max(-60, decibels(block));
    if (this.over || this.socket.readyState !== WebSocket.OPEN) return;
    const samples = this.downsampler.accept(block);
    if (!samples.length) return;
    if (this.socket.bufferedAmount > MOST_WAITING) {
      say("The connection is too slow: some audio was left out.", true);
      return;
    }
    this.socket.send(samples);
    this.sent += samples.length;
    this.sentAt.push([this.sent, performance.now()]);
  }

  take(message) {
    if (message.heard !== undefined) this.measure(message.heard);
    if (message.type === "final") {
      add(message);
      $("partial").textContent = "";
    } else if (message.type === "partial") {
      $("partial").textContent = message.text;
    } else if (message.type === "error") {
      this.problem = message.error.message;
    }
  }

  /** Show how long ago the last sample that was heard had been sent. */
  measure(heard) {
    $("heard").textContent = `${heard.toFixed(1)} s`;
    const samples = Math.round(heard * RATE);
    let sent = null;
    while (this.sentAt.length && this.sentAt[0][0] <= samples) sent = this.sentAt.shift();
    if (sent) $("latency").textContent = `${Math.round(performance.now() - sent[1])} ms`;
  }

  stop(why = "") {
    if (this.over) return;
    this.over = true;
    this.why = why;
    this.release();
    if (this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify({ type: "stop" }));
      return;
    }
    this.socket?.close(); // it may be connecting
    this.closed({ code: 1000 });
  }

  release() {
    for (const track of this.media?.getTracks() ?? []) track.stop();
    if (this.context && this.context.state !== "closed") this.context.close();
    $("level").value = -60;
  }

  closed(event) {
    if (session !== this) return;
    this.over = true;
    this.release();
    const lost = event.code === 1000 ? "" : `The connection ended (${event.code}).`;
    const problem = this.why || this.problem || lost;
    // what could still change will not any more, and the service did not finish it
    $("partial").textContent = "";
    idle();
    say(problem || "Stopped.", Boolean(problem));
  }
}

function idle() {
  session = null;
  $("toggle").textContent = "Start listening";
  $("toggle").setAttribute("aria-pressed", "false");
}

async function toggle() {
  if (session) {
    say("Finishing …");
    session.stop();
    return;
  }
  const begun = new Session();
  session = begun;
  $("toggle").textContent = "Stop";
  $("toggle").setAttribute("aria-pressed", "true");
  say("Asking for the microphone …");
  try {
    await begun.begin();
    if (session === begun && !begun.over) say("Listening. Speak.");
  } catch (error) {
    const stopped = begun.over;
    begun.over = true;
    begun.release();
    begun.socket?.close();
    if (stopped) return; // why was said already, and another session may be on
    if (session === begun) idle();
    const refused = error.name === "NotAllowedError" ? "The microphone was refused." : "";
    const none = error.name === "NotFoundError" ? "There is no microphone." : "";
    say(refused || none || begun.problem || error.message, true);
  }
}

$("toggle").addEventListener("click", toggle);
$("clear").addEventListener("click", () => {
  $("final").replaceChildren();
  $("copy").disabled = $("clear").disabled = true;
});
$("copy").addEventListener("click", async () => {
  const text = [...document.querySelectorAll("#final span")].map((each) => each.textContent).join("\n");
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let the page copy.", true);
  }
});

if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
  $("toggle").disabled = true;
  say("The browser gives no microphone to this page: open it over https or on localhost.", true);
}
fetch("/v1/models").then((answer) => answer.json()).then(
  (models) => { $("model").textContent = `model ${models.data[0].id}`; },
  () => { $("model").textContent = "the service cannot be reached"; },
);
