// Segment a picture with the model that this server serves, in the page.
"use strict";

const LONGEST = 1024; // larger pictures are shrunk: a browser has no gigabytes to spare

const element = (id) => document.getElementById(id);
const shown = { picture: null, mask: null };
let metadata, session;

function say(text, error = false) {
  element("status").textContent = text;
  element("status").className = error ? "error" : "";
}

async function start() {
  ort.env.wasm.wasmPaths = new URL("runtime/", location.href).href;
  metadata = await (await fetch("metadata.json")).json();
  showLegend(null);
  session = await ort.InferenceSession.create("model.onnx", {
    executionProviders: ["wasm"],
    logSeverityLevel: 3,
  });
  say("Ready.");
}

// Height and width at which the model sees a picture: as in training, and bounded.
function workingSize(width, height) {
  const wanted = metadata.short_side ? metadata.short_side / Math.min(width, height) : 1;
  const scale = Math.min(wanted, LONGEST / Math.max(width, height));
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}

// uint8 [1, channels, height, width] of a canvas.
function pixels(context, width, height) {
  const rgba = context.getImageData(0, 0, width, height).data;
  const count = width * height;
  const planes = new Uint8Array(metadata.channels * count);
  for (let index = 0; index < count; index++) {
    const [red, green, blue] = [rgba[4 * index], rgba[4 * index + 1], rgba[4 * index + 2]];
    if (metadata.channels === 1) {
      planes[index] = Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
    } else {
      planes[index] = red;
      planes[count + index] = green;
      planes[2 * count + index] = blue;
    }
  }
  return new ort.Tensor("uint8", planes, [1, metadata.channels, height, width]);
}

// Class ids of an answer: it holds them, or one map per class.
function labels(answer, count) {
  if (metadata.output === "labels") return answer.data;
  const ids = new Uint8Array(count);
  for (let index = 0; index < count; index++) {
    for (let id = 1; id < metadata.classes.length; id++) {
      if (answer.data[id * count + index] > answer.data[ids[index] * count + index]) ids[index] = id;
    }
  }
  return ids;
}

async function segment(file) {
  if (!session) return;
  say(`Segmenting ${file.name} ...`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    say(`${file.name} is no picture that this browser can read; try a JPEG or PNG file.`, true);
    return;
  }
  const [width, height] = workingSize(bitmap.width, bitmap.height);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const started = performance.now();
  const answers = await session.run({ images: pixels(context, width, height) });
  const seconds = (performance.now() - started) / 1000;
  const ids = labels(answers[metadata.output], width * height);

  const colored = context.createImageData(width, height);
  const counts = new Array(metadata.classes.length).fill(0);
  ids.forEach((id, index) => {
    counts[id]++;
    // The background stays as it is in the picture.
    colored.data.set([...metadata.palette[id], id === metadata.background ? 0 : 255], 4 * index);
  });
  context.putImageData(colored, 0, 0);
  Object.assign(shown, { picture: bitmap, mask: canvas });
  draw();
  showLegend(counts.map((count) => count / ids.length));
  element("hint").hidden = true;
  const size = width === bitmap.width ? "" : `, seen at ${width} x ${height}`;
  say(`${file.name}: ${bitmap.width} x ${bitmap.height} pixels${size}, ${seconds.toFixed(2)} s`);
}

function draw() {
  if (!shown.picture) return;
  const canvas = element("picture");
  const scale = Math.min(1, 2048 / Math.max(shown.picture.width, shown.picture.height));
  canvas.width = Math.max(1, Math.round(shown.picture.width * scale));
  canvas.height = Math.max(1, Math.round(shown.picture.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(shown.picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = element("opacity").value / 100;
  context.imageSmoothingEnabled = false;
  context.drawImage(shown.mask, 0, 0, canvas.width, canvas.height);
}

function showLegend(shares) {
  element("legend").replaceChildren(
    ...metadata.classes.map((name, id) => {
      const [item, color, text, share] = ["li", "span", "span", "span"].map((tag) => document.createElement(tag));
      color.className = "color";
      color.style.backgroundColor = `rgb(${metadata.palette[id].join(",")})`;
      text.textContent = name;
      share.className = "share";
      if (shares) share.textContent = `${(100 * shares[id]).toFixed(1)} %`;
      item.classList.toggle("absent", shares !== null && shares[id] === 0);
      item.append(color, text, share);
      return item;
    }),
  );
}

const attempt = (work) => work.catch((error) => say(`It failed: ${error.message}`, true));
const drop = element("drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) attempt(segment(event.dataTransfer.files[0]));
  });
}
element("file").addEventListener("change", (event) => {
  if (event.target.files.length) attempt(segment(event.target.files[0]));
});
element("opacity").addEventListener("input", draw);
attempt(start());
