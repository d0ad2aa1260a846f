// Instructions in Markdown: headings, lists, quotes, emphasis, code. Links are shown as text with their address.
import { h } from "./dom.js";

const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*]+?)\*|\b_(?=\S)([^_]+?)_\b|\[([^\]]+)\]\(([^)\s]+)\)/g;

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(h("code", {}, match[2]));
    else if (match[3] !== undefined) nodes.push(h("strong", {}, inline(match[3])));
    else if (match[4] !== undefined) nodes.push(h("em", {}, inline(match[4])));
    else if (match[5] !== undefined) nodes.push(h("em", {}, inline(match[5])));
    else nodes.push(...inline(match[6]), match[6] === match[7] ? "" : ` (${match[7]})`);
  }
  return [...nodes, text.slice(end)].filter((node) => node !== "");
}

export function markdown(text) {
  const lines = text.split(/\r\n|\n|\r/);
  const nodes = [];
  let at = 0;
  const take = (pattern) => {
    const taken = [];
    while (at < lines.length && pattern.test(lines[at])) taken.push(lines[at++].replace(pattern, ""));
    return taken;
  };
  const list = (tag, pattern) => {
    const items = [];
    while (at < lines.length && (pattern.test(lines[at]) || (items.length && /^ {2,}\S/.test(lines[at])))) {
      if (pattern.test(lines[at])) items.push(lines[at].replace(pattern, ""));
      else items[items.length - 1] += ` ${lines[at].trim()}`;
      at += 1;
    }
    nodes.push(h(tag, {}, items.map((item) => h("li", { dir: "auto" }, inline(item)))));
  };
  while (at < lines.length) {
    const line = lines[at];
    const heading = /^(#{1,4})\s+(.*?)\s*#*$/.exec(line);
    const fence = /^(`{3,}|~{3,})/.exec(line);
    if (!line.trim()) at += 1;
    else if (heading) {
      nodes.push(h(`h${Math.min(heading[1].length + 2, 6)}`, { dir: "auto" }, inline(heading[2])));
      at += 1;
    } else if (fence) {
      const code = [];
      for (at += 1; at < lines.length && !lines[at].startsWith(fence[1]); at += 1) code.push(lines[at]);
      at += 1;
      nodes.push(h("pre", { tabindex: "0" }, h("code", { dir: "ltr" }, code.join("\n"))));
    } else if (/^\s*[-*+]\s+/.test(line)) list("ul", /^\s*[-*+]\s+/);
    else if (/^\s*\d{1,3}[.)]\s+/.test(line)) list("ol", /^\s*\d{1,3}[.)]\s+/);
    else if (/^>\s?/.test(line)) nodes.push(h("blockquote", { dir: "auto" }, inline(take(/^>\s?/).join(" "))));
    else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      nodes.push(h("hr"));
      at += 1;
    } else {
      const paragraph = [line];
      at += 1;
      while (at < lines.length && lines[at].trim() && !/^(#{1,4}\s|`{3,}|~{3,}|>|\s*[-*+]\s|\s*\d{1,3}[.)]\s)/.test(lines[at])) paragraph.push(lines[at++]);
      nodes.push(h("p", { dir: "auto" }, inline(paragraph.join(" "))));
    }
  }
  return nodes;
}
