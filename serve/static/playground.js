// The page on which a person tries a model: inputs by the schema, sealed here (Oblivious HTTP, RFC 9458), sent, opened here.
"use strict";
(() => {
  const utf8 = new TextEncoder(), text = new TextDecoder();
  const $ = (id) => document.getElementById(id);

  // --- bytes -----------------------------------------------------------------------------------------------------------

  function joined(...parts) {
    const out = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
    let at = 0;
    for (const part of parts) { out.set(part, at); at += part.length; }
    return out;
  }

  function varint(n) {
    if (n < 64) return Uint8Array.of(n);
    if (n < 16384) return Uint8Array.of(0x40 | (n >> 8), n & 255);
    return Uint8Array.of(0x80 | (n >>> 24), (n >> 16) & 255, (n >> 8) & 255, n & 255);
  }

  const prefixed = (bytes) => joined(varint(bytes.length), bytes);

  // Zeros behind its end, so that the length tells a class of sizes and not the content (as serve/bhttp.py does).
  function padded(message) {
    const power = 2 ** Math.ceil(Math.log2(message.length)), step = power <= 16384 ? power : power / 16;
    const out = new Uint8Array(Math.max(512, Math.ceil(message.length / step) * step));
    out.set(message);
    return out;
  }

  // A binary HTTP request (RFC 9292).
  function written(path, headers, body) {
    const lines = Object.entries(headers).flatMap((pair) => pair.map((v) => prefixed(utf8.encode(v))));
    const control = ["POST", location.protocol.slice(0, -1), location.host, path].map((v) => prefixed(utf8.encode(v)));
    return padded(joined(varint(0), ...control, prefixed(joined(...lines)), prefixed(body), varint(0)));
  }

  // A binary HTTP response of known length: {status, body}.
  function read(message) {
    let at = 0;
    const number = () => {
      const first = message[at], size = 1 << (first >> 6);
      let n = first & 63;
      for (let i = 1; i < size; i++) n = n * 256 + message[at + i];
      at += size;
      return n;
    };
    const take = (n) => message.subarray(at, (at += n));
    if (number() !== 1) throw new Error("the answer is no binary HTTP response");
    const status = number();
    take(number());
    return { status, body: take(number()) };
  }

  // --- the sealed request ------------------------------------------------------------------------------------------------

  async function sealed(model, verb, payload, token) {
    const base = `/v1/models/${encodeURIComponent(model.name)}`, path = `${base}:${verb}`;
    const answered = await fetch(`${base}/ohttp-keys`);
    if (!answered.ok) throw new Error(await complaint(answered));
    const listed = new Uint8Array(await answered.arrayBuffer());
    const id = listed[2], publicKey = listed.slice(5, 37);
    const suite = new HPKE.CipherSuite({
      kem: new HPKE.DhkemX25519HkdfSha256(), kdf: new HPKE.HkdfSha256(), aead: new HPKE.Aes128Gcm(),
    });
    const header = Uint8Array.of(id, 0, 0x20, 0, 1, 0, 1);
    const sender = await suite.createSenderContext({
      recipientPublicKey: await suite.kem.deserializePublicKey(publicKey.buffer),
      info: joined(utf8.encode("message/bhttp request"), [0], header),
    });
    const headers = { "content-type": "application/json", date: new Date().toUTCString() };
    if (token) headers.authorization = `Bearer ${token}`;
    const plain = utf8.encode(JSON.stringify(payload)), enc = new Uint8Array(sender.enc);
    const sent = joined(header, enc, new Uint8Array(await sender.seal(written(path, headers, plain))));
    const began = performance.now();
    const outer = await fetch(path, { method: "POST", body: sent, headers: { "content-type": "message/ohttp-req" } });
    const received = new Uint8Array(await outer.arrayBuffer()), ms = performance.now() - began;
    if (!outer.ok) throw new Error(`the endpoint could not open the request (${outer.status})`);
    const salt = joined(enc, received.slice(0, 16));
    const secret = await sender.export(utf8.encode("message/bhttp response"), 16);
    const from = await crypto.subtle.importKey("raw", secret, "HKDF", false, ["deriveBits"]);
    const derive = (info, n) =>
      crypto.subtle.deriveBits({ name: "HKDF", hash: "SHA-256", salt, info: utf8.encode(info) }, from, 8 * n);
    const key = await crypto.subtle.importKey("raw", await derive("key", 16), "AES-GCM", false, ["decrypt"]);
    const iv = await derive("nonce", 12);
    const message = new Uint8Array(await crypto.subtle.decrypt({ name: "AES-GCM", iv }, key, received.slice(16)));
    const { status, body } = read(message);
    return { ...opened(status, text.decode(body)), sent, received, plain, ms, sealed: true };
  }

  async function inClear(model, verb, payload, token) {
    const headers = { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };
    const body = JSON.stringify(payload), began = performance.now();
    const answer = await fetch(`/v1/models/${encodeURIComponent(model.name)}:${verb}`, { method: "POST", headers, body });
    const said = await answer.text(), plain = utf8.encode(body);
    return { ...opened(answer.status, said), sent: plain, received: utf8.encode(said), plain, ms: performance.now() - began };
  }

  function opened(status, body) {
    const said = JSON.parse(body);
    if (status !== 200) throw new Error(said.error || `the endpoint answered ${status}`);
    return { said };
  }

  async function complaint(answer) {
    const said = await answer.text();
    try { return JSON.parse(said).error || said; } catch { return said; }
  }

  // --- inputs ------------------------------------------------------------------------------------------------------------

  function element(tag, attributes = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in made && typeof value !== "string") made[name] = value; else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  }

  // Each gives {node, value(): what a request has for the feature, clear()}.
  function input(feature, number) {
    const id = `${feature.name.replace(/\W/g, "-")}-${number}`;
    const label = element("label", { for: id }, feature.name, ...(feature.optional ? [" (may be empty)"] : []));
    const line = (field, value) => ({ node: element("div", { class: "field" }, label, field), value: () => value(field) });
    const missing = (v) => (v === "" && feature.optional ? null : v);
    if (feature.kind === "tensor" && feature.shape.length === 2) return pad(feature, id);
    if (feature.kind === "number") {
      const start = feature.mean === null ? "" : String(Number(feature.mean.toPrecision(4)));
      const field = element("input", { id, type: "number", step: "any", value: start });
      return line(field, (f) => (f.value === "" ? missing("") : Number(f.value)));
    }
    if (feature.kind === "time") return line(element("input", { id, type: "datetime-local", step: "1" }), (f) => missing(f.value && `${f.value}Z`));
    if (feature.kind === "image") return picture(feature, id, label);
    if (feature.kind === "text" && feature.values.length) {
      const options = feature.values.map((v) => element("option", { value: v }));
      const list = element("datalist", { id: `${id}-values` }, ...options);
      const made = line(element("input", { id, type: "text", list: `${id}-values`, value: feature.values[0] }), (f) => missing(f.value));
      made.node.append(list);
      return made;
    }
    if (feature.kind === "text") return line(element("textarea", { id, rows: "3" }), (f) => missing(f.value));
    const zeros = feature.shape.reduceRight((inside, n) => Array(n).fill(inside), 0);
    const field = element("textarea", { id, rows: "4", spellcheck: "false" });
    field.value = JSON.stringify(feature.kind === "list" ? [1, 2] : zeros);
    return line(field, (f) => JSON.parse(f.value));
  }

  // A pad to draw on: strokes are scaled until they fill the image, and each number is the share of its cell that is covered.
  function pad(feature, id) {
    const [height, width] = feature.shape, size = 256, low = feature.low ?? 0, high = feature.high ?? 1;
    const canvas = element("canvas", { id, width: size, height: Math.round((size * height) / width), role: "img", tabindex: "0",
      "aria-label": `${feature.name}: a pad of ${height} by ${width} to draw on` });
    const small = element("canvas", { width, height, class: "small", role: "img", "aria-label": "what the model gets" });
    const numbers = element("textarea", { id: `${id}-numbers`, rows: "4", spellcheck: "false" });
    let strokes = [], typed = null;
    const pen = canvas.getContext("2d");
    const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--text");

    function trace(on, points, scale, x, y, line) {
      on.lineCap = on.lineJoin = "round";
      on.lineWidth = line;
      for (const stroke of points) {
        on.beginPath();
        stroke.forEach(([a, b], i) => on[i ? "lineTo" : "moveTo"]((a - x) * scale, (b - y) * scale));
        if (stroke.length === 1) on.lineTo((stroke[0][0] - x) * scale + 0.1, (stroke[0][1] - y) * scale);
        on.stroke();
      }
    }

    function cells() {
      if (typed) return typed;
      const each = 8, big = new OffscreenCanvas(width * each, height * each), on = big.getContext("2d", { willReadFrequently: true });
      const points = strokes.flat();
      if (points.length) {
        const [xs, ys] = [0, 1].map((i) => points.map((p) => p[i]));
        const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
        const thick = each * 1.15, inner = [big.width - thick, big.height - thick];
        const scale = Math.min(inner[0] / Math.max(right - left, 1), inner[1] / Math.max(bottom - top, 1), 4);
        const x = (left + right) / 2 - big.width / 2 / scale, y = (top + bottom) / 2 - big.height / 2 / scale;
        trace(on, strokes, scale, x, y, thick);
      }
      const alpha = on.getImageData(0, 0, big.width, big.height).data;
      return Array.from({ length: height }, (_, r) => Array.from({ length: width }, (_, c) => {
        let sum = 0;
        for (let i = 0; i < each; i++) for (let j = 0; j < each; j++) sum += alpha[4 * ((r * each + i) * big.width + c * each + j) + 3];
        return Math.round(low + ((high - low) * sum) / (255 * each * each));
      }));
    }

    function show() {
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.strokeStyle = ink();
      trace(pen, strokes, 1, 0, 0, canvas.width / 11);
      const found = cells();
      paint(small, found.flat().map((v) => [(v - low) / (high - low || 1)]), width, ([v]) => [76, 134, 198, 255 * v]);
      if (!typed) numbers.value = JSON.stringify(found);
    }

    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
    };
    let drawing = false;
    canvas.onpointerdown = (e) => { canvas.setPointerCapture(e.pointerId); drawing = true; typed = null; strokes.push([at(e)]); show(); };
    canvas.onpointermove = (e) => { if (drawing) { strokes.at(-1).push(at(e)); show(); } };
    canvas.onpointerup = canvas.onpointercancel = () => { drawing = false; };
    numbers.onchange = () => { typed = JSON.parse(numbers.value); strokes = []; show(); };
    const clear = () => { strokes = []; typed = null; show(); };
    const button = element("button", { type: "button", class: "quiet" }, "clear");
    button.onclick = clear;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    queueMicrotask(show);
    const more = element("details", {}, element("summary", {}, "its numbers, to read or to type"),
      element("label", { for: `${id}-numbers` }, `${height} rows of ${width} numbers, from ${low} to ${high}`), numbers);
    const both = element("div", { class: "pad" }, canvas, element("div", {}, small, element("p", { class: "hint" }, "what the model gets"), button));
    return { node: element("div", { class: "field" }, element("span", { class: "label" }, `draw: ${feature.name}`), both, more), value: cells };
  }

  function picture(feature, id, label) {
    let content = null;
    const field = element("input", { id, type: "file", accept: "image/*" }), shown = element("img", { alt: "", class: "shown", hidden: true });
    field.onchange = async () => {
      const file = field.files[0];
      if (!file) return;
      const bytes = new Uint8Array(await file.arrayBuffer());
      let binary = "";
      for (let i = 0; i < bytes.length; i += 32768) binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
      content = { b64: btoa(binary) };
      shown.src = URL.createObjectURL(file);
      shown.alt = file.name;
      shown.hidden = false;
    };
    return { node: element("div", { class: "field" }, label, field, shown), value: () => content };
  }

  function paint(canvas, values, width, colour) {
    const on = canvas.getContext("2d"), image = on.createImageData(width, values.length / width);
    values.forEach((v, i) => image.data.set(colour(v), 4 * i));
    on.putImageData(image, 0, 0);
  }

  // --- answers -----------------------------------------------------------------------------------------------------------

  function best(answer, classes) {
    if (!classes.length) return String(Number(Number([answer].flat()[0]).toPrecision(6)));
    return classes[answer.indexOf(Math.max(...answer))];
  }

  function bars(names, values, title, signed) {
    const most = Math.max(...values.map(Math.abs), 1e-12);
    const rows = names.map((name, i) => element("tr", {},
      element("th", { scope: "row" }, String(name)),
      element("td", { class: "bar" }, element("span", { class: values[i] < 0 ? "less" : "more",
        style: `width:${(100 * Math.abs(values[i])) / (signed ? most : 1)}%` })),
      element("td", { class: "number" }, signed ? `${values[i] < 0 ? "−" : "+"}${Math.abs(values[i]).toFixed(4)}` : values[i].toFixed(4))));
    return element("table", { class: "bars" }, element("caption", {}, title), element("tbody", {}, ...rows));
  }

  function shownAnswer(model, answer) {
    const parts = model.tasks.length ? model.tasks.map((t) => [t, answer[t.name]]) : [[model, answer]];
    return parts.flatMap(([task, own]) => {
      const what = task.target || task.name;
      const head = element("p", { class: "answer" }, `${what}: `, element("strong", {}, String(best(own, task.classes))));
      return task.classes.length ? [head, bars(task.classes, own, `probability of each ${what}`, false)] : [head];
    });
  }

  function shownExplanation(explained) {
    const flat = [], out = [];
    for (const [name, value] of Object.entries(explained.features)) {
      if (Array.isArray(value) && Array.isArray(value[0])) out.push(heat(name, value));
      else if (Array.isArray(value)) value.forEach((v, i) => flat.push([`${name}[${i}]`, v]));
      else flat.push([name, value]);
    }
    flat.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    const top = flat.slice(0, 12);
    if (top.length) out.push(bars(top.map(([n]) => n), top.map(([, v]) => v), "what moved the answer most", true));
    const what = explained.output === undefined ? "the answer" : `the probability of ${explained.output}`;
    const said = `${what} is ${explained.value.toFixed(4)}; it is ${explained.base.toFixed(4)} for the mean training row`;
    return [element("h3", {}, "Why"), element("p", { class: "hint" }, said), ...out];
  }

  function heat(name, grid) {
    const values = grid.flat(), most = Math.max(...values.map(Math.abs), 1e-12);
    const canvas = element("canvas", { width: grid[0].length, height: grid.length, class: "heat", role: "img",
      "aria-label": `${name}: where the answer comes from; the strongest place adds ${most.toFixed(3)}` });
    paint(canvas, values, grid[0].length, (v) => [...(v < 0 ? [217, 130, 43] : [76, 134, 198]), (255 * Math.abs(v)) / most]);
    return element("figure", {}, canvas, element("figcaption", { class: "hint" }, "blue speaks for the answer, orange against it"));
  }

  function hex(bytes, most = 96) {
    const lines = [];
    for (let at = 0; at < Math.min(bytes.length, most); at += 16) {
      const some = [...bytes.subarray(at, Math.min(at + 16, most))];
      const seen = some.map((b) => (b > 31 && b < 127 ? String.fromCharCode(b) : "·")).join("");
      lines.push(`${some.map((b) => b.toString(16).padStart(2, "0")).join(" ").padEnd(48)} ${seen}`);
    }
    return lines.join("\n") + (bytes.length > most ? `\n… ${bytes.length - most} more` : "");
  }

  function travelled(done) {
    const how = done.sealed
      ? `Sealed here for the model alone: ${done.sent.length} bytes went, ${done.received.length} came back, in ${Math.round(done.ms)} ms.`
      : `In clear: ${done.sent.length} bytes went, ${done.received.length} came back, in ${Math.round(done.ms)} ms.`;
    return element("details", { class: "wire", open: true }, element("summary", {}, "What travelled"), element("p", {}, how),
      element("h4", {}, "the request, as anybody between sees it"), element("pre", { tabindex: "0", class: "sent" }, hex(done.sent)),
      element("h4", {}, "the answer"), element("pre", { tabindex: "0" }, hex(done.received)),
      element("h4", {}, "what is inside the request"), element("pre", { tabindex: "0" }, text.decode(done.plain).slice(0, 400)));
  }

  // --- files of rows ------------------------------------------------------------------------------------------------------

  function rowsOf(name, content, model) {
    if (!/\.csv$/i.test(name)) {
      const said = JSON.parse(content);
      return said.instances || (Array.isArray(said) ? said : [said]);
    }
    const cells = [[]];
    for (const [, quoted, plain, end] of content.replace(/\r/g, "").matchAll(/(?:"((?:[^"]|"")*)"|([^,\n"]*))(,|\n|$)/g)) {
      cells.at(-1).push(quoted === undefined ? plain : quoted.replace(/""/g, '"'));
      if (end === "\n") cells.push([]);
      if (end === "") break;
    }
    const [head, ...rows] = cells.filter((row) => row.length > 1 || row[0]);
    const known = Object.fromEntries(model.features.map((f) => [f.name, f]));
    return rows.map((row) => Object.fromEntries(head.map((n, i) => [n, row[i]]).filter(([n]) => known[n]).map(([n, v]) => {
      if (v === "" && known[n].optional) return [n, null];
      return [n, known[n].kind === "number" ? Number(v) : ["tensor", "list"].includes(known[n].kind) ? JSON.parse(v) : v];
    })));
  }

  // --- a model's part of the page ------------------------------------------------------------------------------------------

  function section(model, number, given) {
    const form = element("form", { "aria-label": `ask ${model.name}` }), out = element("div", { class: "out", "aria-live": "polite" });
    const fields = model.features.map((f) => [f, input(f, number)]);
    const why = element("input", { type: "checkbox", id: `why-${number}`, checked: true });
    const token = element("input", { type: "password", id: `token-${number}`, autocomplete: "off", value: given });
    const file = element("input", { type: "file", id: `rows-${number}`, accept: ".json,.csv" });
    const send = element("button", {}, model.encrypted === "off" ? "predict" : "seal and predict");
    const ask = (verb, rows) => (model.encrypted === "off" ? inClear : sealed)(model, verb, { instances: rows }, token.value);
    form.append(
      element("div", { class: "fields" }, ...fields.map(([, f]) => f.node)),
      element("div", { class: "row" }, send, element("label", { for: why.id }, why, " explain the answer")),
      element("details", {}, element("summary", {}, "rows of a file, a token"),
        element("div", { class: "field drop" }, element("label", { for: file.id }, "a .json or .csv file of rows (or drop it here)"), file),
        element("div", { class: "field" }, element("label", { for: token.id }, "access token, where the endpoint asks for one"), token)));

    async function trying(work) {
      send.disabled = true;
      out.replaceChildren(element("p", { class: "hint" }, "asking …"));
      try { out.replaceChildren(...(await work())); }
      catch (error) { out.replaceChildren(element("p", { class: "error", role: "alert" }, error.message)); }
      send.disabled = false;
    }

    form.onsubmit = (event) => {
      event.preventDefault();
      trying(async () => {
        const row = Object.fromEntries(fields.map(([f, i]) => [f.name, i.value()]).filter(([, v]) => v !== null));
        const done = await ask("predict", [row]);
        const parts = [...shownAnswer(model, done.said.predictions[0]), travelled(done)];
        if (why.checked && !model.tasks.length) parts.splice(-1, 0, ...shownExplanation((await ask("explain", [row])).said.explanations[0]));
        return parts;
      });
    };
    const take = (chosen) => trying(async () => {
      const rows = rowsOf(chosen.name, await chosen.text(), model), done = await ask("predict", rows);
      const lines = done.said.predictions.map((p, i) => {
        const said = model.tasks.length ? model.tasks.map((t) => `${t.name} ${best(p[t.name], t.classes)}`).join(", ") : best(p, model.classes);
        return element("tr", {}, element("td", {}, String(i + 1)), element("td", {}, String(said)));
      });
      const head = element("tr", {}, ...["row", model.target].map((n) => element("th", { scope: "col" }, n)));
      const csv = ["row,prediction", ...done.said.predictions.map((p, i) => `${i + 1},${model.tasks.length ? JSON.stringify(p) : best(p, model.classes)}`)];
      const link = element("a", { download: "predictions.csv", href: URL.createObjectURL(new Blob([csv.join("\n")])) }, "all as CSV");
      return [element("p", {}, `${rows.length} rows; `, link), element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines.slice(0, 50))), travelled(done)];
    });
    file.onchange = () => file.files[0] && take(file.files[0]);
    form.ondragover = (event) => event.preventDefault();
    form.ondrop = (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    };
    const answers = model.tasks.length ? model.tasks.map((t) => t.name).join(", ") : model.target;
    const said = `Predicts ${answers}${model.classes.length ? `, one of ${model.classes.join(", ")}` : ""}.`;
    const title = element("h2", {}, `${model.name} `, element("small", {}, `version ${model.version}`));
    return element("section", {}, title, element("p", {}, said), element("div", { class: "sides" }, form, out));
  }

  // --- the page ----------------------------------------------------------------------------------------------------------

  const show = (models, token) => $("sections").replaceChildren(...models.map((model, number) => section(model, number, token)));

  // Where the endpoint asks for a token before it says what its models are. It is kept in the page's fields alone.
  function signIn() {
    const token = element("input", { type: "password", id: "token", autocomplete: "off", required: true });
    const said = element("p", { class: "error", role: "alert" });
    const form = element("form", { "aria-label": "sign in" },
      element("p", {}, "This endpoint answers to people with an access token (", element("code", {}, "heliograph token add"), " makes one)."),
      element("div", { class: "field" }, element("label", { for: token.id }, "access token"), token),
      element("div", { class: "row" }, element("button", {}, "open")), said);
    form.onsubmit = async (event) => {
      event.preventDefault();
      const answer = await fetch(location.href, { headers: { authorization: `Bearer ${token.value}` } });
      const models = JSON.parse(new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("models").textContent);
      if (models) show(models, token.value);
      else said.textContent = answer.status === 403 ? "This token may not read what the models are." : "This token is not valid here.";
    };
    $("sections").replaceChildren(form);
    token.focus();
  }

  if (!crypto.subtle) $("insecure").hidden = false;
  const models = JSON.parse($("models").textContent);
  if (models) show(models, ""); else signIn();
})();
