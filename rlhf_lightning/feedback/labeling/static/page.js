// The page of one annotator: what all modes share. What a mode shows and which keys it has: views.js.
import { Api, Refused, button, dialog, folded, h, key, request, status } from "./dom.js";
import { markdown } from "./markdown.js";
import { VIEWS } from "./views.js";

const api = new Api();
const top = document.getElementById("top");
const main = document.getElementById("main");
const bar = document.getElementById("bar");
const SKIPS = ["I do not know enough", "All answers are equally bad", "The prompt is unclear", "Harmful or upsetting", "Another reason"];
const page = { settings: null, state: null, view: null, revealed: false, busy: false, undone: null, task: null, polling: 0 };
const clock = { seen: 0, since: 0, worked: 0, reminded: 0 }; // milliseconds in which the page is visible

// ---- time -----------------------------------------------------------------------------------------------------------

function tick() {
  const now = performance.now();
  if (clock.since) {
    clock.seen += now - clock.since;
    clock.worked += now - clock.since;
  }
  clock.since = document.hidden ? 0 : now;
}

function seconds() {
  tick();
  return Math.round(clock.seen / 100) / 10;
}

function remindOfBreak() {
  tick();
  const minutes = page.settings?.break_minutes;
  if (!minutes || clock.worked - clock.reminded < 60000 * minutes || document.querySelector("dialog[open]")) return;
  clock.reminded = clock.worked;
  const node = dialog("Time for a break?", [
    h("p", {}, `You have been labeling for ${Math.round(clock.worked / 60000)} minutes. A few minutes away from the screen keep judgments steady. Nothing is lost, and nobody is waiting.`),
  ], [button("Continue", "Esc", () => node.close(), { class: "primary", autofocus: true })]);
}

// ---- requests -------------------------------------------------------------------------------------------------------

// Sends one change. A repeated attempt has the same name, so the server records it once.
async function send(action, body, said, named = request()) {
  if (page.busy) return false;
  page.busy = true;
  document.body.classList.add("busy");
  try {
    const answer = await api.post(action, { ...body, request: named });
    page.undone = answer.undone ?? null;
    if (said) status(said);
    else document.getElementById("status").hidden = true;
    update(answer.state);
    return true;
  } catch (error) {
    if (!(error instanceof Refused)) {
      status(["Not saved: the server cannot be reached. ", button("Try again", null, () => { page.busy || send(action, body, said, named); })], 0);
    } else if (error.reason === "stale" || error.reason === "unknown") lost(error);
    else {
      status(error.message, 10);
      if (error.state && ["gone", "labeled", "withdrawn", "pending", "stale"].includes(error.reason)) update(error.state);
    }
    return false;
  } finally {
    page.busy = false;
    document.body.classList.remove("busy");
  }
}

function lost(error) {
  if (page.view?.unsaved?.()) { // what is written stays on the screen
    const here = error.reason === "stale" ? button("Use this tab", null, start) : "";
    return status([error.message, " Your text is not saved; it stays here, so that you can copy it. ", here], 0);
  }
  top.replaceChildren();
  const action = error.reason === "stale" ? [button("Use this tab", "Enter", start, { class: "primary", autofocus: true })] : [];
  message(error.reason === "stale" ? "This tab is not in use" : "This link does not work", error.message, action);
  page.view = null;
  return undefined;
}

async function start() {
  try {
    page.settings = await api.open();
    document.title = `Labeling: ${page.settings.annotator}`;
    tick();
    update(page.settings);
    if (page.settings.instructions && !page.state.done && !page.state.ask_group && !page.state.withdrawn) instructions();
  } catch (error) {
    if (error instanceof Refused) lost(error);
    else message("The server cannot be reached", "It may have ended. Labels that were confirmed are saved.", [button("Try again", "Enter", start, { class: "primary", autofocus: true })]);
  }
}

// ---- what is shown --------------------------------------------------------------------------------------------------

function update(state) {
  page.state = state;
  clearTimeout(page.polling);
  header();
  if (state.withdrawn) return message("Your labels are withdrawn", "Nothing that you did here will be in any export. Nothing more is recorded. Thank you for your time.");
  if (state.ask_group) return askGroup();
  if (!state.task) return finished();
  const task = JSON.stringify([state.task.item, state.task.prompt, state.task.responses]);
  if (task !== page.task || page.undone) {
    tick();
    clock.seen = 0;
    page.revealed = !state.task.warning;
  }
  if (task !== page.task || page.undone || !page.view) draw(); // else what is half done stays, as an order of answers
  page.task = task;
  return undefined;
}

function draw() {
  const task = page.state.task;
  bar.hidden = true;
  bar.replaceChildren();
  main.className = `main mode-${page.settings.mode}`;
  page.view = null;
  if (!page.revealed) {
    main.replaceChildren(h("section", { class: "notice warning" },
      h("h2", {}, "Content warning"), h("p", { dir: "auto" }, task.warning),
      h("p", { class: "dim" }, "The text is hidden until you ask for it. You may skip it without giving a reason."),
      h("div", { class: "row" }, button("Show it", "w", reveal, { class: "primary" }), button("Skip", "x", () => send("skip", { item: task.item, reason: "Content warning" }, "Skipped.")))));
    return;
  }
  const turns = conversation(task);
  const prompt = h("section", { class: "conversation", "aria-label": "Conversation" }, turns.map((one) => one.node));
  page.view = VIEWS[page.settings.mode]({ task, settings: page.settings, undone: page.undone, bar, submit, send, prompt, turns });
  main.replaceChildren(...page.view.nodes);
  bar.hidden = !bar.childElementCount;
  fit();
  if (!page.view.keepScroll) window.scrollTo(0, 0);
  page.view.ready?.();
}

// The bar at the bottom covers nothing: the page ends above it.
function fit() {
  document.documentElement.style.setProperty("--bar", `${bar.hidden ? 0 : bar.offsetHeight}px`);
}

function submit(values, said) {
  return send("label", { item: page.state.task.item, seconds: seconds(), ...values }, said);
}

function conversation(task) {
  const names = { user: task.prompt.length > 1 || page.settings.mode === "chat" ? "User" : "Prompt", assistant: "Assistant", system: "System", tool: "Tool", developer: "Developer" };
  return task.prompt.map((message) =>
    folded(h("article", { class: `turn ${message.role}` }, h("h3", {}, names[message.role] || message.role)), message.content || ""));
}

function header() {
  const { done, left, task, undo, withdrawn } = page.state;
  const total = left === null ? null : done + left;
  const chat = page.settings.mode === "chat";
  const flagged = task?.flagged;
  const open = Boolean(task) && !withdrawn;
  top.replaceChildren(
    h("div", { class: "progress" },
      h("span", {}, total === null ? `${done} ${done === 1 ? "label" : "labels"}` : `${done} of ${total}`),
      total === null ? null : h("progress", { max: Math.max(total, 1), value: done, "aria-label": "Progress" })),
    h("nav", { class: "row", "aria-label": "Actions" },
      page.settings.instructions ? button("Instructions", "i", instructions) : null,
      button("Undo", "u", undo_, { disabled: !undo || Boolean(withdrawn) }),
      open && !chat ? button("Skip", "x", skip) : null,
      open && task.item ? button(flagged ? "Flagged" : "Flag", "g", flag, { class: flagged ? "on" : null }) : null,
      open && chat ? button("New", "n", newConversation, { disabled: !task.turns }) : null,
      button("Help", "?", help)));
}

function message(title, text, actions = []) {
  bar.hidden = true;
  fit();
  main.className = "main";
  main.replaceChildren(h("section", { class: "notice" }, h("h2", {}, title), h("p", {}, text), h("div", { class: "row" }, actions)));
  main.querySelector("[autofocus]")?.focus();
}

function finished() {
  page.view = null;
  const { done, left } = page.state;
  if (left) {
    message("Nothing for you at the moment", `${left} ${left === 1 ? "item is" : "items are"} being labeled by others. This page looks again by itself.`);
    page.polling = setTimeout(() => api.post("state").then((answer) => update(answer.state), () => finished()), 5000);
  } else message("All done", `You made ${done} ${done === 1 ? "label" : "labels"}. Thank you! You can close this page; Undo goes back to the last one.`);
}

function askGroup() {
  page.view = null;
  bar.hidden = true;
  const groups = page.settings.groups;
  const choose = (group) => send("group", { group }).then((ok) => { if (ok && page.settings.instructions && !page.state.done) instructions(); });
  main.className = "main";
  main.replaceChildren(h("section", { class: "notice" }, h("h2", {}, "Before you begin"),
    h("p", {}, "Would you say that you belong to one of these groups? The answer is stored with your labels, so that the views of a group can be seen. You may leave it blank."),
    h("div", { class: "stack" }, groups.map((group, place) => button(group, place < 9 ? String(place + 1) : null, () => choose(group), { dir: "auto" })),
      button("I would rather not say", "0", () => choose(null), { class: "quiet" }))));
  page.view = { keys: Object.fromEntries([["0", () => choose(null)], ...groups.slice(0, 9).map((group, place) => [String(place + 1), () => choose(group)])]), help: [] };
}

function reveal() {
  page.revealed = true;
  draw();
}

// ---- actions --------------------------------------------------------------------------------------------------------

function undo_() {
  if (page.state.undo) send("undo", {}, { label: "Undone: your last label.", skip: "Undone: the skip.", turn: "Undone: your last message.", new: "Back in the conversation before." }[page.state.undo]);
}

function newConversation() {
  if (page.state.task?.turns) send("new", {}, "A new conversation.");
}

function reasons(title, options, note, done) {
  const input = h("input", { type: "text", maxlength: "500", placeholder: "In your own words (optional)", dir: "auto", "aria-label": "Reason" });
  const finish = (reason) => { node.close(); done([reason, input.value.trim()].filter(Boolean).join(": ") || options[options.length - 1]); };
  const node = dialog(title, [h("p", { class: "dim" }, note), input,
    h("div", { class: "stack" }, options.map((option, place) => button(option, String(place + 1), () => finish(option))))],
    [button("Cancel", "Esc", () => node.close())]);
  node.addEventListener("keydown", (event) => {
    if (event.target === input) {
      if (event.key === "Enter" && input.value.trim()) { event.preventDefault(); finish(""); }
      return;
    }
    const place = Number(event.key) - 1;
    if (options[place]) { event.preventDefault(); finish(options[place]); }
  });
  node.querySelector(".stack button").focus();
}

function skip() {
  const item = page.state.task?.item;
  if (item) reasons("Skip this one", SKIPS, "It is not shown to you again. The reason is stored.", (reason) => send("skip", { item, reason }, "Skipped."));
}

function flag() {
  const item = page.state.task?.item;
  if (item) reasons("Flag a problem", ["Personal data", "Broken or cut off text", "Against the rules", "Something else"], "You can still label it. Whoever runs this sees the flag.", (reason) => send("flag", { item, reason }, "Flagged."));
}

function instructions() {
  const node = dialog("Instructions", markdown(page.settings.instructions), [button("Close", "Esc", () => node.close(), { class: "primary", autofocus: true })]);
  node.classList.add("wide", "markdown");
}

function help() {
  const lines = [...(page.view?.help || []), ["u", "undo"], ["x", "skip, with a reason"], ["g", "flag a problem"], ["i", "instructions"],
    ["w", "show text behind a content warning"], ["Esc", "leave a text field or a dialog"], ["?", "this help"]];
  const skipped = [...(page.settings.mode === "chat" ? ["x"] : []), ...(page.settings.instructions ? [] : ["i"])];
  const node = dialog("Keys", [
    h("dl", { class: "keys" }, lines.filter(([name]) => !skipped.includes(name)).map(([name, what]) => [h("dt", {}, name.split(" ").map((part) => key(part))), h("dd", {}, what)])),
    h("p", { class: "dim" }, `You are ${page.settings.annotator}. Every label is saved before the page goes on; you may stop and come back at any time. Stored are your labels, reasons and texts, when they were made, and how long they took.`),
  ], [button("Withdraw all my labels", null, () => { node.close(); withdraw(); }, { class: "danger" }), button("Close", "Esc", () => node.close(), { class: "primary", autofocus: true })]);
}

function withdraw() {
  const node = dialog("Withdraw all your labels?", [h("p", {}, "None of your labels, texts, skips and flags will be in any export from now on. This cannot be undone, and ends your work here.")],
    [button("Keep them", "Esc", () => node.close(), { autofocus: true }), button("Withdraw", null, () => { node.close(); send("withdraw", {}); }, { class: "danger" })]);
}

// ---- keys -----------------------------------------------------------------------------------------------------------

const GLOBAL = { u: undo_, x: skip, g: flag, i: () => page.settings?.instructions && instructions(), n: newConversation, "?": help, w: () => !page.revealed && reveal() };

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing || !page.settings) return;
  const field = event.target.closest?.("textarea, input");
  if (field) {
    if (event.key === "Escape") field.blur();
    else page.view?.typing?.(event);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const name = (event.shiftKey && event.key.length > 1 ? "Shift+" : "") + (event.key.length === 1 ? event.key.toLowerCase() : event.key);
  if (name === "Enter" && event.target.closest?.("button")) return; // the button's own
  const act = page.view?.keys?.[name] ?? (page.state?.withdrawn || page.state?.ask_group ? null : GLOBAL[name]);
  if (!act || event.repeat && !/Arrow/.test(name)) return;
  if (name === "x" && (page.settings.mode === "chat" || !page.state.task)) return;
  if (name === "x" && !page.revealed) {
    event.preventDefault();
    send("skip", { item: page.state.task.item, reason: "Content warning" }, "Skipped.");
    return;
  }
  event.preventDefault();
  if (name !== "Enter") event.target.closest?.("button")?.blur(); // Enter is for what was just marked, not for the button
  if (!page.busy) act(event);
});

// A button that was clicked with a pointer keeps no focus, or Enter would press it again; capture: before it opens a dialog.
document.addEventListener("click", (event) => { if (event.detail) event.target.closest?.("button")?.blur(); }, true);

document.addEventListener("visibilitychange", () => {
  tick();
  if (document.hidden || page.busy || !page.view) return;
  api.post("state").catch((error) => { if (error instanceof Refused) lost(error); }); // another tab may have taken over
});
window.addEventListener("resize", fit);
window.addEventListener("beforeunload", (event) => { if (page.view?.unsaved?.()) event.preventDefault(); });
setInterval(remindOfBreak, 10000);
start();
