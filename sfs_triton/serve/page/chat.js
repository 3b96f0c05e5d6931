// The conversation: what is shown of it, and what of it is sent on.

import { make, number } from "./view.js";

export class Chat {
  /** `show` is called with the runs of a turn whose canvas somebody wants to see again. */
  constructor(root, show) {
    this.root = root;
    this.list = root.querySelector("#turns");
    this.empty = root.querySelector("#empty");
    this.show = show;
    this.clear();
  }

  clear() {
    this.turns = [];
    this.list.replaceChildren();
    this.empty.hidden = false;
  }

  /** The messages so far and a new one. Turns that failed, or were stopped before they said anything, are left out. */
  messages(prompt) {
    const said = this.turns.filter((turn) => turn.runs[0].text && turn.runs[0].state !== "failed");
    const past = said.flatMap(({ prompt, runs }) => [message("user", prompt), message("assistant", runs[0].text)]);
    return [...past, message("user", prompt)];
  }

  begin(prompt, runs) {
    const text = make("div", { kind: "text" });
    const note = make("span", { kind: "note" });
    const again = make("button", { type: "button", text: "Show canvas" });
    again.addEventListener("click", () => this.show(turn.runs));
    const turn = { prompt, runs, text, note };
    this.turns.push(turn);
    this.empty.hidden = true;
    this.list.append(
      make("li", { kind: "user" }, make("h3", { text: "You" }), make("div", { kind: "text", text: prompt })),
      make("li", { kind: "model" }, make("h3", { text: "Model" }), text, make("p", { kind: "row" }, note, again)),
    );
    this.root.scrollTop = this.root.scrollHeight;
    return turn;
  }

  /** Bring a turn up to date with its first run, whose answer it is. */
  draw(turn) {
    const [run] = turn.runs;
    if (turn.text.textContent !== run.text) {
      turn.text.textContent = run.text;
      this.root.scrollTop = this.root.scrollHeight;
    }
    turn.note.textContent = describe(run);
  }
}

function message(role, content) {
  return { role, content };
}

/** A run in a line. */
export function describe(run) {
  const { nfe, tpf, seconds } = run.counts(run.steps.length);
  const spent = `${nfe} forwards, ${number(tpf, 2)} tokens each, ${number(seconds, 2)} s`;
  const partly = run.steps.length ? `: ${spent}` : "";
  return run.state === "done" ? spent : run.state === "stopped" ? `stopped${partly}` : run.state;
}
