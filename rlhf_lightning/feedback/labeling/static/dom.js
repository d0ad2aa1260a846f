// Elements and texts. Nothing here, or anywhere on this page, makes markup from a text: texts become text nodes.

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name in node && typeof value === "boolean") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const key = (name) => h("kbd", {}, name);

export function button(label, shortcut, listener, props = {}) {
  const node = h("button", { type: "button", on: { click: listener }, ...props }, label);
  if (shortcut) node.append(" ", key(shortcut));
  return node;
}

// A text of a person or a model as paragraphs, each in its own direction, with fenced code as it was written.
export function shown(text) {
  const nodes = [];
  let lines = [];
  let code = null; // the lines of an open fence
  let fence = "";
  const flush = () => {
    for (const paragraph of lines.join("\n").split(/\n{2,}/)) {
      if (paragraph.trim()) nodes.push(h("p", { dir: "auto" }, paragraph.replace(/^\n+|\n+$/g, "")));
    }
    lines = [];
  };
  const close = () => {
    nodes.push(h("pre", { tabindex: "0" }, h("code", { dir: "ltr" }, code.join("\n"))));
    code = null;
  };
  for (const line of text.split(/\r\n|\n|\r/)) {
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    if (code === null && mark) {
      flush();
      code = [];
      fence = mark[1];
    } else if (code !== null && mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !line.trim().slice(mark[1].length)) close();
    else (code ?? lines).push(line);
  }
  if (code !== null) close();
  flush();
  return nodes.length ? nodes : [h("p", { class: "empty" }, "(empty)")];
}

// A text in a box of limited height; where it is longer, a button below shows it whole, and keys can scroll it.
export function folded(node, text) {
  const body = h("div", { class: "text" }, shown(text));
  const more = h("button", { type: "button", class: "more quiet", hidden: true, on: { click: () => toggle() } });
  const isOpen = () => node.classList.contains("open");
  const toggle = (open = !isOpen()) => {
    node.classList.toggle("open", open);
    more.textContent = open ? "Show less" : "Show all";
    more.setAttribute("aria-expanded", String(open));
  };
  const measure = () => {
    more.hidden = !(isOpen() && !more.hidden) && body.scrollHeight <= body.clientHeight + 4;
    node.classList.toggle("long", !more.hidden);
    if (more.hidden) body.removeAttribute("tabindex");
    else body.tabIndex = 0;
  };
  toggle(false);
  node.append(body, more);
  new ResizeObserver(measure).observe(body, { box: "border-box" });
  return { node, toggle, isOpen };
}

export function dialog(title, content, actions = []) {
  const node = h("dialog", { class: "dialog", "aria-label": title },
    h("h2", {}, title), h("div", { class: "dialog-body" }, content), h("div", { class: "row end" }, actions));
  node.addEventListener("close", () => node.remove());
  node.addEventListener("click", (event) => { if (event.target === node) node.close(); });
  document.body.append(node);
  node.showModal();
  return node;
}

export function status(content, seconds = 2.5) {
  const node = document.getElementById("status");
  node.replaceChildren(...(Array.isArray(content) ? content : [content]));
  node.hidden = false;
  clearTimeout(status.timer);
  if (seconds) status.timer = setTimeout(() => { node.hidden = true; }, 1000 * seconds);
}

export class Refused extends Error {
  constructor(body, code) {
    super(body.error || `the server answered ${code}`);
    this.reason = body.reason || "server";
    this.state = body.state;
  }
}

// Requests of this page. The token of the link is in its fragment, which is never sent by the browser itself.
export class Api {
  constructor() {
    this.base = location.pathname.replace(/\/+$/, "");
    this.tab = "";
  }

  async open() {
    const token = decodeURIComponent(location.hash.slice(1));
    if (token) history.replaceState(null, "", location.pathname);
    const answer = await this.post("open", token ? { token } : {});
    this.tab = answer.tab;
    return answer.state;
  }

  async post(action, body = {}) {
    const response = await fetch(`${this.base}/${action}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Tab": this.tab },
      body: JSON.stringify(body),
      credentials: "same-origin",
    });
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Refused(answer, response.status);
    return answer;
  }
}

export const request = () => crypto.randomUUID();
