// Pictures from the server's /wplus/preview: a quick one at once, a finer one when nothing has changed for a moment.

import { api } from "../../scripts/api.js";

const QUICK = 128;
const FINE = 256;
const REST = 100; // milliseconds without a change before the finer picture

const page = Math.random().toString(36).slice(2);
let panels = 0;

/** Asks for one picture at a time; of the wishes that come meanwhile only the last counts. */
export class Preview {
  /** show(url, size, kept, about): a picture is ready. say(message, isError): what to tell, "" for nothing. */
  constructor(show, say) {
    Object.assign(this, { client: `${page}.${panels++}`, show, say });
    this.asked = null;
    this.wish = null;
    this.running = false;
    this.refining = null;
  }

  /** fields: of the request's body. about: handed back with the picture. */
  ask(fields, about) {
    const asked = JSON.stringify(fields);
    if (asked === this.asked) return;
    this.asked = asked;
    this.wish = { fields, about };
    this.refining?.abort();
    if (!this.running) this.run();
  }

  stop() {
    this.asked = this.wish = null;
    this.refining?.abort();
  }

  async run() {
    this.running = true;
    try {
      while (this.wish) {
        const wish = this.wish;
        this.wish = null;
        if (!(await this.picture(wish, QUICK)) || this.wish) continue;
        this.refining = new AbortController();
        await rest(REST, this.refining.signal);
        if (!this.wish) await this.picture(wish, FINE, this.refining.signal);
      }
    } finally {
      this.running = false;
      this.refining = null;
    }
  }

  async picture({ fields, about }, size, signal) {
    try {
      const body = JSON.stringify({ ...fields, size, client: this.client });
      const headers = { "Content-Type": "application/json" };
      const answer = await api.fetchApi("/wplus/preview", { method: "POST", headers, body, signal });
      if (answer.status === 409) return false;
      if (!answer.ok) {
        const { error } = await answer.json().catch(() => ({ error: `the server answers ${answer.status}` }));
        this.fail(error);
        return false;
      }
      const url = URL.createObjectURL(await answer.blob());
      this.show(url, size, Number(answer.headers.get("X-WPlus-Kept") ?? 1), about);
      return true;
    } catch (error) {
      if (error.name !== "AbortError") this.fail("no answer from the server");
      return false;
    }
  }

  fail(message) {
    this.asked = null; // so that the same wish may be tried again
    this.say(message, true);
  }
}

function rest(milliseconds, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      done();
    });
  });
}

let catalogue = null;

/** What the server knows, asked once; again makes it ask anew. */
export function serverCatalogue(again = false) {
  if (!catalogue || again) {
    catalogue = api.fetchApi("/wplus/directions").then((answer) => (answer.ok ? answer.json() : {}));
    catalogue.catch(() => (catalogue = null));
  }
  return catalogue;
}
