// Two runs in figures.

import { make, number } from "./view.js";

/** Fill in the table once both runs are over. `names` are what they are called. */
export function summarize(table, runs, names) {
  table.hidden = !(runs.length === 2 && runs.every((run) => run.end));
  if (table.hidden) return;
  const counts = runs.map((run) => run.counts(run.steps.length));
  table.tBodies[0].replaceChildren(...counts.map((count, side) => row(names[side], count)));
  const texts = runs[0].text === runs[1].text ? "The two texts are equal." : "The two texts differ.";
  table.caption.textContent = `${compare(...counts, ...names)} ${texts}`;
}

function row(name, { nfe, tpf, speed, seconds }) {
  const cells = [String(nfe), number(tpf, 2), number(speed, 1), number(seconds, 2)];
  return make("tr", {}, make("th", { scope: "row", text: name }), ...cells.map((text) => make("td", { text })));
}

function compare(a, b, one, other) {
  const forwards = times(a.nfe, b.nfe, "fewer");
  return `${one} took ${forwards} forwards (NFE) and ${times(a.seconds, b.seconds, "less")} time than ${other}.`;
}

function times(a, b, less) {
  return a > b ? `${number(a / b, 1)} times more` : `${number(b / a, 1)} times ${less}`;
}
