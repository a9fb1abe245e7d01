// Samples of any rate to 16-bit samples at 16 kHz as they come: a windowed-sinc filter, no state but the last samples.

export const RATE = 16000;
const CROSSINGS = 16;

export class Downsampler {
  constructor(rate) {
    this.step = rate / RATE; // samples of the microphone to one of ours
    this.cutoff = Math.min(1, 1 / this.step) * 0.95;
    this.half = Math.ceil(CROSSINGS / this.cutoff);
    this.kept = new Float32Array(this.half); // silence before the first sample
    this.next = this.half; // where the next sample of ours is, in this.kept
  }

  /** Take a Float32Array and return the Int16Array that is known by now. */
  accept(block) {
    const data = new Float32Array(this.kept.length + block.length);
    data.set(this.kept);
    data.set(block, this.kept.length);
    const made = [];
    while (this.next + this.half < data.length) {
      const value = Math.max(-1, Math.min(1, this.at(data, this.next)));
      made.push(Math.max(-32768, Math.min(32767, Math.round(value * 32768))));
      this.next += this.step;
    }
    const passed = Math.max(0, Math.floor(this.next) - this.half);
    this.kept = data.slice(passed);
    this.next -= passed;
    return Int16Array.from(made);
  }

  at(data, centre) {
    const first = Math.ceil(centre - this.half);
    const last = Math.floor(centre + this.half);
    let sum = 0;
    for (let place = Math.max(0, first); place <= last; place += 1) {
      const distance = place - centre;
      const angle = Math.PI * distance * this.cutoff;
      const sinc = distance === 0 ? 1 : Math.sin(angle) / angle;
      const hann = 0.5 + 0.5 * Math.cos((Math.PI * distance) / (this.half + 1));
      sum += data[place] * sinc * hann * this.cutoff;
    }
    return sum;
  }
}

/** Return the level of a block in dB of full scale. */
export function decibels(block) {
  let sum = 0;
  for (const value of block) sum += value * value;
  return 10 * Math.log10(Math.max(1e-12, sum / block.length));
}
