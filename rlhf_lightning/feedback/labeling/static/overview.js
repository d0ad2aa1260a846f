// The page of whoever runs the labeling: how far it is, and how well annotators agree.
import { Api, Refused, button, dialog, h, request, status } from "./dom.js";

const api = new Api();
const main = document.getElementById("main");
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)}%`);
const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

function fact(name, value, note) {
  return h("div", { class: "fact" }, h("div", { class: "fact-name" }, name), h("div", { class: "fact-value" }, value), note ? h("div", { class: "dim" }, note) : null);
}

function draw(state) {
  const total = state.left === null ? null : state.labels + state.left;
  const heads = ["Annotator", "Group", "Labels", "Skipped", "Flags", "Seconds", "Agreement", "Checks", "Last label", ""];
  const row = (one) => h("tr", { class: one.withdrawn ? "withdrawn" : null }, [
    one.annotator, one.group ?? "–", one.labels, one.skips, one.flags, one.seconds ?? "–", percent(one.agreement),
    one.checks ? `${one.checks_passed} of ${one.checks}` : "–", one.last ? new Date(one.last).toLocaleTimeString() : "–",
  ].map((value, place) => h("td", { dir: place < 2 ? "auto" : null, "data-name": heads[place] }, String(value))),
  h("td", {}, one.withdrawn ? h("span", { class: "dim" }, "withdrawn") : button("Withdraw", null, () => withdraw(one.annotator), { class: "quiet" })));
  main.className = "main wide";
  main.replaceChildren(
    h("h1", {}, "Labeling overview"),
    h("section", { class: "facts" },
      fact("Labels", String(state.labels), total === null ? "conversations have no end" : `of ${total} that are needed; check questions come on top`),
      fact("Items", String(state.items), `mode ${state.mode}`),
      fact("Percent agreement", percent(state.agreement), plural(state.pairs, "pair") + " of labels of one item"),
      fact("Seconds per label", state.seconds === null ? "–" : String(state.seconds), "median")),
    total === null ? "" : h("progress", { max: Math.max(total, 1), value: state.labels, "aria-label": "Progress" }),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, state.annotators.map(row)))),
    state.skips.length ? h("section", {}, h("h2", {}, "Why items were skipped"), h("ul", {}, state.skips.map((one) => h("li", { dir: "auto" }, `${one.reason}: ${one.count}`)))) : "",
    state.flags.length ? h("section", {}, h("h2", {}, "Flags"), h("ul", {}, state.flags.map((one) => h("li", { dir: "auto" }, `${one.item}, ${one.annotator}: ${one.reason}`)))) : "",
    state.refused ? h("p", { class: "dim" }, `${plural(state.refused, "label")} for items that are not in the data ${state.refused === 1 ? "was" : "were"} refused and recorded.`) : "",
    h("p", { class: "dim" }, "Percent agreement is the share of pairs of answers that two annotators put in the same order, ties included; it is not corrected for chance. This page is renewed every five seconds."));
}

function withdraw(annotator) {
  const node = dialog(`Withdraw the labels of ${annotator}?`, [h("p", {}, "Nothing of this annotator will be in any export from now on, and the link ends. This cannot be undone.")], [
    button("Keep them", "Esc", () => node.close(), { autofocus: true }),
    button("Withdraw", null, () => { node.close(); load("withdraw", { annotator, request: request() }); }, { class: "danger" })]);
}

async function load(action, body = {}) {
  try {
    draw(action === "open" ? await api.open() : (await api.post(action, body)).state);
  } catch (error) {
    if (error instanceof Refused && ["stale", "unknown"].includes(error.reason)) {
      const again = error.reason === "stale" ? button("Use this tab", "Enter", start, { class: "primary" }) : null;
      clearInterval(load.timer);
      main.replaceChildren(h("section", { class: "notice" }, h("h2", {}, "This tab is not in use"), h("p", {}, error.message.replace("Labels go on there.", "")), again ?? ""));
    } else status(error instanceof Refused ? error.message : "The server cannot be reached; it may have ended.", 0);
  }
}

function start() {
  load.timer = setInterval(() => { if (!document.hidden && !document.querySelector("dialog[open]")) load("state"); }, 5000);
  load("open");
}

start();
