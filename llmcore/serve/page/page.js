// The chat page. What a model writes reaches the document as text nodes alone: elements are made here, by name, and
// nothing is ever parsed as HTML.

const $ = (id) => document.getElementById(id);
let messages = []; // {role, content}: the chat as the server sees it
let running = null; // the AbortController of the answer that is being written

// ---- Markdown, the part of it that models write

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]+)\]\(([^()\s]+)\)/s;

function inline(text) {
  const nodes = [];
  if (text.length > 5000) return [document.createTextNode(text)]; // patterns take time quadratic in a line's length
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(document.createTextNode(text.slice(0, found.index)));
    const [whole, , code, bold, italic, label, address] = found;
    if (code !== undefined) nodes.push(element("code", "", code));
    else if (bold !== undefined) nodes.push(element("strong", "", ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", "", ...inline(italic)));
    else nodes.push(link(label, address, whole));
  }
  if (text) nodes.push(document.createTextNode(text));
  return nodes;
}

function link(label, address, whole) {
  if (!/^https?:\/\//i.test(address)) return document.createTextNode(whole); // no javascript:, no data:
  const made = element("a", "", label);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = address;
  return made;
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const copy = element("button", "", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => navigator.clipboard.writeText(text));
  const block = element("div", "code", element("pre", "", element("code", "", text)), copy);
  if (language) block.title = language;
  return block;
}

const ITEM = /^(\s*)(?:[-*+]|(\d+)[.)])\s+(.*)$/;

function list(lines, depth) {
  const ordered = ITEM.exec(lines[0])[2] !== undefined;
  const made = element(ordered ? "ol" : "ul", "");
  const indent = ITEM.exec(lines[0])[1].length;
  if (ordered) made.start = Number(ITEM.exec(lines[0])[2]);
  let item = null;
  let inner = [];
  const close = () => {
    if (item && inner.length) item.append(...blocks(inner, depth + 1));
    inner = [];
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent + 1) {
      close();
      item = element("li", "", ...inline(found[3]));
      made.append(item);
    } else inner.push(line.replace(/^ {1,4}/, ""));
  }
  close();
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, name) => element("tr", "", ...cells(line).map((cell) => element(name, "", ...inline(cell.trim()))));
  return element("table", "", row(lines[0], "th"), ...lines.slice(2).map((line) => row(line, "td")));
}

function blocks(lines, depth = 0) {
  const made = [];
  if (depth > 8) return [element("p", "", lines.join("\n"))];
  for (let i = 0; i < lines.length; ) {
    const begin = i;
    const fence = /^\s*(```+|~~~+)\s*(\S*)/.exec(lines[i]);
    const heading = /^(#{1,6})\s+(.*)$/.exec(lines[i]);
    if (fence) {
      const end = lines.findIndex((line, j) => j > i && line.trim().startsWith(fence[1]));
      i = end < 0 ? lines.length : end + 1; // a block that is still being written goes on to the end
      made.push(codeBlock(lines.slice(begin + 1, end < 0 ? i : end), fence[2]));
    } else if (heading) {
      made.push(element(`h${Math.min(heading[1].length, 3)}`, "", ...inline(heading[2])));
      i++;
    } else if (/^\s*>/.test(lines[i])) {
      while (i < lines.length && /^\s*>/.test(lines[i])) i++;
      made.push(element("blockquote", "", ...blocks(lines.slice(begin, i).map((line) => line.replace(/^\s*> ?/, "")), depth + 1)));
    } else if (ITEM.test(lines[i])) {
      while (i < lines.length && (ITEM.test(lines[i]) || /^\s+\S/.test(lines[i]))) i++;
      made.push(list(lines.slice(begin, i), depth));
    } else if (/^\s*\|.*\|/.test(lines[i]) && /^\s*\|[\s:|-]+\|?\s*$/.test(lines[i + 1] ?? "")) {
      while (i < lines.length && /^\s*\|/.test(lines[i])) i++;
      made.push(table(lines.slice(begin, i)));
    } else if (!lines[i].trim()) {
      i++;
    } else {
      const special = /^\s*(```|~~~|>)|^#{1,6}\s/;
      do i++;
      while (i < lines.length && lines[i].trim() && !special.test(lines[i]) && !ITEM.test(lines[i]));
      made.push(element("p", "", ...paragraph(lines.slice(begin, i))));
    }
  }
  return made;
}

function paragraph(lines) {
  return lines.flatMap((line, i) => (i ? [document.createElement("br"), ...inline(line)] : inline(line)));
}

export const markdown = (text) => blocks(text.split("\n"));

// ---- the chat

function show(role, text) {
  const shown = element("div", `message ${role}`, text);
  $("messages").append(shown);
  shown.scrollIntoView({ block: "end" });
  return shown;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function request() {
  const system = $("system").value.trim();
  const asked = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"])
    if ($(name).value !== "") asked[name] = Number($(name).value);
  return asked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

class Answer {
  constructor() {
    this.shown = show("assistant writing", "");
    this.content = this.thoughts = "";
    this.drawing = false;
  }

  add({ content, reasoning_content: thoughts, tool_calls: calls }) {
    this.content += content ?? "";
    this.thoughts += thoughts ?? "";
    for (const call of calls ?? []) this.content += (call.function.name ?? "") + (call.function.arguments ?? "");
    if (!this.drawing) requestAnimationFrame(() => this.draw());
    this.drawing = true;
  }

  draw() {
    this.drawing = false;
    const box = $("messages");
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    const open = this.shown.querySelector("details")?.open ?? false;
    const parts = markdown(this.content);
    if (this.thoughts) {
      const thoughts = element("details", "thoughts", element("summary", "", "Thoughts"), element("div", "", this.thoughts));
      thoughts.open = open || !this.content;
      parts.unshift(thoughts);
    }
    this.shown.replaceChildren(...parts);
    if (follows) box.scrollTop = box.scrollHeight;
  }
}

async function send(text) {
  const chat = messages; // a new one may begin meanwhile
  chat.push({ role: "user", content: text });
  show("user", text);
  const answer = new Answer();
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  say("…");
  const begun = performance.now();
  let problem = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) answer.add(choice.delta);
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000;
        const count = event.usage.completion_tokens;
        say(`${count} tokens in ${seconds.toFixed(1)} s, ${(count / seconds).toFixed(1)} a second`);
      }
    }
  } catch (error) {
    problem = error;
  }
  answer.draw();
  answer.shown.classList.remove("writing");
  if (answer.content) chat.push({ role: "assistant", content: answer.content });
  else chat.pop(); // nothing came of it: the turn can be sent again
  if (problem?.name === "AbortError") say(chat === messages ? "stopped" : "");
  else if (problem) {
    say("");
    show("error", problem.message);
    if (!answer.content) $("input").value ||= text;
  }
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("input").focus();
}

async function findModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return say(await failure(response), true);
  const names = (await response.json()).data.map((model) => model.id);
  $("model").replaceChildren(...names.map((name) => element("option", "", name)));
  say("");
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  send(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
  say("");
});
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  findModels();
});
if (matchMedia("(min-width: 60rem)").matches) $("settings").open = true;
findModels().catch(() => say("the server does not answer", true));
