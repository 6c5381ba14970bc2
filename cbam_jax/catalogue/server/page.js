"use strict";
// One query at a time: a photo that was sent, or a photo of the catalogue by its id.
const at = (id) => document.getElementById(id);
let photo = null, id = null, box = null, asked = 0;

async function answer(address, options) {
  const response = await fetch(address, options);
  const found = await response.json().catch(() => ({ error: "the server cannot answer now" }));
  if (!response.ok) throw new Error(found.error);
  return found;
}

async function find() {
  if (photo === null && id === null) return;
  const mine = ++asked, query = new URLSearchParams({ k: at("k").value });
  if (at("category").value) query.set("where", "category=" + at("category").value);
  if (at("copies").checked) query.set("copies", true);
  if (id !== null) query.set("id", id);
  else if (box) query.set("box", inPixels(box).join(","));
  at("status").textContent = "Searching ...";
  at("error").textContent = "";
  try {
    const body = id === null ? photo : undefined;
    const found = await answer("/search?" + query, { method: "POST", body });
    if (mine === asked) show(found.neighbours);
  } catch (error) {
    if (mine !== asked) return;
    at("status").textContent = "";
    at("error").textContent = error.message;
  }
}

function show(neighbours) {
  const many = neighbours.filter((n) => !n.same).length;
  let rank = 0;
  at("status").textContent = many ? many + " found, nearest first" : "Nothing was found.";
  at("results").replaceChildren(...neighbours.map((n) => card(n, n.same ? 0 : ++rank)));
}

function known(payload) {
  return Object.entries(payload).map(([name, value]) => name + ": " + value).join(", ");
}

function also(n) {
  const names = n.copies.slice(0, 3).map((copy) => copy.name).join(", ");
  const more = n.copies.length - 3;
  return names && "also as " + names + (more > 0 ? " and " + more + " more" : "");
}

function card(n, rank) {
  const item = document.createElement("li"), find = document.createElement("button");
  const image = document.createElement("img"), text = document.createElement("span");
  const more = document.createElement("button");
  image.src = "/items/" + n.id + "/photo?size=320";
  image.alt = "Photo " + n.id + ", " + known(n.payload);
  image.loading = "lazy";
  find.className = "find";
  find.title = "Find what looks like this";
  find.append(image);
  find.onclick = () => { location.hash = "id=" + n.id; };
  const own = n.copy_of === null ? "This photo" : "A copy of photo " + n.copy_of;
  text.textContent = [(rank ? rank + ". distance " : own + ", distance ") +
    n.distance.toFixed(4), known(n.payload), also(n)].filter(Boolean).join(", ");
  more.className = "more";
  more.textContent = "Enlarge";
  more.onclick = () => enlarge(n);
  item.append(find, text, more);
  return item;
}

let large = null, asking = false;
function enlarge(n) {
  large = n;
  at("why").hidden = true;
  at("large-photo").hidden = asking = false;
  at("why-text").textContent = "";
  at("large-photo").src = "/items/" + n.id + "/photo?size=1600";
  at("large-photo").alt = "Photo " + n.id;
  at("large-text").textContent = n.name + (known(n.payload) ? ": " + known(n.payload) : "");
  at("large").showModal();
}

// Both photos, coloured by how much each part counts for their likeness.
async function explain() {
  if (asking) return;
  asking = true;  // The button keeps the focus.
  const n = large, query = new URLSearchParams();
  if (id !== null) query.set("query", id);
  else if (box) query.set("box", inPixels(box).join(","));
  at("why-text").textContent = "Looking; the first time takes a while ...";
  let text;
  try {
    const body = id === null ? photo : undefined;
    const found = await answer("/items/" + n.id + "/why?" + query, { method: "POST", body });
    if (n !== large) return;
    for (const name of ["query", "result"]) picture(at("why-" + name), found[name]);
    at("why").hidden = false;
    at("large-photo").hidden = true;
    text = found.empty ? "No part stands out: to the model the two are all alike." :
      "Red: the parts that make the two look alike to the model. Blue: parts that count little.";
  } catch (error) {
    text = error.message;
    asking = n !== large && asking;
  }
  if (n === large) at("why-text").textContent = text;
}

function picture(image, base64) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
}

function preview(source) {
  if (at("photo").src.startsWith("blob:")) URL.revokeObjectURL(at("photo").src);
  at("photo").src = source;
  at("preview").hidden = false;
  at("hint").hidden = id !== null;
  setBox(null);
}

function take(file) {
  if (!file) return;
  photo = file;
  id = null;
  history.replaceState(null, "", location.pathname);
  preview(URL.createObjectURL(file));
  find();
}

function fromAddress() {
  const match = /^#id=(\d+)$/.exec(location.hash);
  if (!match) return;
  id = Number(match[1]);
  photo = null;
  preview("/items/" + id + "/photo?size=640");
  scrollTo({ top: 0 });
  find();
}

// The box, as shares of the photo's width and height: x1, y1, x2, y2.
function setBox(next) {
  box = next;
  at("box").hidden = at("clear").hidden = !box;
  if (!box) return;
  const [x1, y1, x2, y2] = box, style = at("box").style;
  style.left = 100 * x1 + "%";
  style.top = 100 * y1 + "%";
  style.width = 100 * (x2 - x1) + "%";
  style.height = 100 * (y2 - y1) + "%";
}

function inPixels([x1, y1, x2, y2]) {
  const w = at("photo").naturalWidth, h = at("photo").naturalHeight;
  return [Math.floor(x1 * w), Math.floor(y1 * h), Math.ceil(x2 * w), Math.ceil(y2 * h)];
}

function place(event) {
  const edges = at("photo").getBoundingClientRect();
  const share = (x, from, size) => Math.min(1, Math.max(0, (x - from) / size));
  return [share(event.clientX, edges.left, edges.width),
          share(event.clientY, edges.top, edges.height)];
}

let start = null;
at("frame").onpointerdown = (event) => {
  if (id !== null || event.button) return;
  event.preventDefault();
  start = place(event);
  at("frame").setPointerCapture(event.pointerId);
};
at("frame").onpointermove = (event) => {
  if (!start) return;
  const [x, y] = place(event);
  setBox([Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])]);
};
at("frame").onpointerup = () => {
  start = null;
  if (box && (box[2] - box[0] < 0.03 || box[3] - box[1] < 0.03)) setBox(null);
  find();
};
at("box").onkeydown = (event) => {
  const step = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, -0.02], ArrowDown: [0, 0.02] };
  const by = step[event.key];
  if (!by) return;
  event.preventDefault();
  const [x1, y1, x2, y2] = box, first = event.shiftKey ? [0, 0] : by;
  const next = [x1 + first[0], y1 + first[1], x2 + by[0], y2 + by[1]];
  if (next.every((x) => x >= 0 && x <= 1) && next[2] - next[0] > 0.03 && next[3] - next[1] > 0.03) {
    setBox(next);
    find();
  }
};
at("begin-box").onclick = () => { setBox([0.2, 0.2, 0.8, 0.8]); at("box").focus(); find(); };
at("ask-why").onclick = explain;
at("large").onclose = () => { large = null; };
at("clear").onclick = () => { setBox(null); find(); };
at("category").onchange = at("k").onchange = at("copies").onchange = find;
at("file").onchange = () => take(at("file").files[0]);
document.onpaste = (event) => take([...event.clipboardData.files][0]);
document.ondragover = (event) => { event.preventDefault(); at("drop").classList.add("over"); };
document.ondragleave = () => at("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
};
onhashchange = fromAddress;

async function begin() {
  try {
    const { photos } = await answer("/health");
    at("count").textContent = photos + " photos";
    const { categories } = await answer("/categories");
    at("category").append(...categories.map((name) => new Option(name, name)));
  } catch (error) {
    at("error").textContent = error.message;
  }
  fromAddress();
}
begin();
