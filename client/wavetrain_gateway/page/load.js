// SPDX-License-Identifier: Apache-2.0
// The engines' load, asked for once a second while the page is looked at.

import { getJson } from "./api.js";
import { Chart } from "./charts.js";

const PERIOD_MS = 1000;

export class LoadPanel {
  constructor(note, parent, getKey) {
    this.note = note;
    this.parent = parent;
    this.getKey = getKey;
    this.last = null;
    this.requests = new Chart(parent, "Requests", ["running", "waiting"]);
    this.cache = new Chart(parent, "KV cache", [""], { top: 1, show: (value) => `${(100 * value).toFixed(1)} %` });
    this.speed = new Chart(parent, "Output tokens/s", [""]);
  }

  start() {
    const tick = async () => {
      if (!document.hidden) await this.ask();
      setTimeout(tick, PERIOD_MS);
    };
    tick();
  }

  async ask() {
    try {
      const { engines } = await getJson("load", this.getKey());
      if (engines.length) this.show(engines);
      this.parent.hidden = !engines.length;
      this.note.hidden = engines.length > 0;
    } catch {
      this.last = null; // the state line says what is wrong
    }
  }

  show(engines) {
    const sum = (name) => engines.reduce((total, engine) => total + engine[name], 0);
    const now = { time: performance.now() / 1000, tokens: sum("num_output_tokens") };
    const passed = this.last ? now.time - this.last.time : 0;
    const speed = passed > 0 ? Math.max(0, now.tokens - this.last.tokens) / passed : 0;
    this.last = now;
    this.requests.add([sum("num_running"), sum("num_waiting")]);
    this.cache.add([sum("kv_cache_usage") / engines.length]);
    this.speed.add([speed]);
  }
}
