// SPDX-License-Identifier: Apache-2.0
// The messages on the page, and the answer that is being written.

const NAMES = { user: "You", assistant: "Model", completion: "Completion" };

export class Conversation {
  constructor(log) {
    this.log = log;
    this.messages = [];
  }

  clear() {
    this.messages = [];
    this.log.replaceChildren();
  }

  add(role, text) {
    const article = document.createElement("article");
    article.dataset.role = role;
    const title = document.createElement("h3");
    title.textContent = NAMES[role];
    const body = document.createElement("pre");
    if (role === "completion") body.className = "code";
    body.textContent = text;
    article.append(title, body);
    this.log.append(article);
    this.follow(true);
    return new Message(this, article, body);
  }

  // What later messages go along with.
  remember(prompt, answer) {
    this.messages.push({ role: "user", content: prompt }, { role: "assistant", content: answer });
  }

  // Stays at the end for those who are there.
  follow(isForced = false) {
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 120;
    if (isAtEnd || isForced) this.log.scrollTop = this.log.scrollHeight;
  }
}

class Message {
  constructor(conversation, article, body) {
    Object.assign(this, { conversation, article, body });
    this.node = body.firstChild ?? body.appendChild(document.createTextNode(""));
    article.setAttribute("aria-busy", "true"); // read out when it is complete
  }

  append(text) {
    this.node.appendData(text);
    this.conversation.follow();
  }

  get isShown() {
    return this.article.isConnected;
  }

  get text() {
    return this.node.data;
  }

  end(note) {
    this.article.removeAttribute("aria-busy");
    if (!note) return;
    const element = document.createElement("p");
    element.className = "note";
    element.textContent = note;
    this.article.append(element);
    this.conversation.follow();
  }
}
