"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const settings = JSON.parse(element("demo-settings").textContent);
  const [height, width] = settings.size;
  const canvas = element("canvas");
  const pad = canvas.getContext("2d", { willReadFrequently: true });
  const rows = [...document.querySelectorAll("[data-model]")];
  const say = (text) => (element("state").textContent = text);
  const turn = (value) => (settings.isDarkOnLight ? 1 - value : value); // between ink and pixels

  // The engine and the models, taken apart when they are first needed.
  function bytesOf(text) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let place = 0; place < binary.length; place++) bytes[place] = binary.charCodeAt(place);
    return bytes;
  }
  async function unpack(id) {
    const packed = new Blob([bytesOf(element(id).textContent)]);
    const stream = packed.stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  async function load() {
    say("Unpacking engine and models …");
    const address = URL.createObjectURL(new Blob([await unpack("engine-module")], { type: "text/javascript" }));
    const engine = await import(address);
    URL.revokeObjectURL(address);
    engine.env.wasm.wasmBinary = await unpack("engine-wasm");
    engine.env.wasm.numThreads = 1;
    const sessions = [];
    for (const row of rows) {
      const model = await unpack(row.dataset.model);
      sessions.push(await engine.InferenceSession.create(model, { executionProviders: ["wasm"] }));
    }
    say("Ready: draw.");
    return { engine, sessions };
  }
  let loading = null;
  const ready = () => (loading ??= load());

  // From a drawing to what MNIST's images are: the ink in a box of 20 of 28 pixels, its centre of mass in the middle.
  // Ink (0 to 1) is averaged over the area that each new pixel covers.
  function resize(ink, from, box, to) {
    const result = new Float32Array(to.width * to.height);
    const [stepX, stepY] = [box.width / to.width, box.height / to.height];
    const overlap = (start, end, place) => Math.max(0, Math.min(end, place + 1) - Math.max(start, place));
    for (let y = 0; y < to.height; y++) {
      for (let x = 0; x < to.width; x++) {
        const [left, top] = [box.left + x * stepX, box.top + y * stepY];
        let sum = 0;
        for (let v = Math.floor(top); v < top + stepY && v < from.height; v++) {
          for (let u = Math.floor(left); u < left + stepX && u < from.width; u++) {
            sum += ink[v * from.width + u] * overlap(left, left + stepX, u) * overlap(top, top + stepY, v);
          }
        }
        result[y * to.width + x] = sum / (stepX * stepY);
      }
    }
    return result;
  }
  function boxOf(ink, from) {
    let [left, right, top, bottom] = [from.width, -1, from.height, -1];
    ink.forEach((value, place) => {
      if (value < 0.1) return;
      const [x, y] = [place % from.width, Math.floor(place / from.width)];
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
    });
    return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
  }
  function centre(ink, size) {
    let [mass, sumX, sumY] = [0, 0, 0];
    ink.forEach((value, place) => {
      mass += value;
      sumX += value * (place % size.width);
      sumY += value * Math.floor(place / size.width);
    });
    const within = (start, room) => Math.max(0, Math.min(room, start));
    const left = within(Math.round((width - 1) / 2 - sumX / mass), width - size.width);
    const top = within(Math.round((height - 1) / 2 - sumY / mass), height - size.height);
    const pixels = new Float32Array(width * height);
    ink.forEach((value, place) => {
      pixels[(top + Math.floor(place / size.width)) * width + left + (place % size.width)] = value;
    });
    return pixels;
  }
  function pixelsOfDrawing() {
    const from = { width: canvas.width, height: canvas.height };
    const image = pad.getImageData(0, 0, from.width, from.height).data;
    const ink = Float32Array.from({ length: from.width * from.height }, (_, place) => image[4 * place] / 255);
    const box = boxOf(ink, from);
    if (!box) return null;
    if (!settings.isCentred) return resize(ink, from, { left: 0, top: 0, ...from }, { width, height }).map(turn);
    const scale = ((Math.min(width, height) / 28) * 20) / Math.max(box.width, box.height);
    const size = {
      width: Math.max(1, Math.round(box.width * scale)),
      height: Math.max(1, Math.round(box.height * scale)),
    };
    return centre(resize(ink, from, box, size), size).map(turn);
  }

  function showPixels(target, pixels) {
    const context = target.getContext("2d");
    const image = context.createImageData(width, height);
    pixels.forEach((value, place) => image.data.set([255 * value, 255 * value, 255 * value, 255], 4 * place));
    context.putImageData(image, 0, 0);
    return target;
  }

  function softmax(logits) {
    const highest = Math.max(...logits);
    const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
    const sum = powers.reduce((total, power) => total + power, 0);
    return powers.map((power) => power / sum);
  }
  function showAnswer(row, results) {
    const probabilities = softmax(results.logits.data);
    const best = probabilities.indexOf(Math.max(...probabilities));
    row.querySelector(".says").textContent = settings.classes[best];
    row.querySelector(".percent").textContent = `${(100 * probabilities[best]).toFixed(1)} %`;
    row.querySelector(".meter > span").style.width = `${100 * probabilities[best]}%`;
    if (results.top_experts) {
      const weights = results.expert_weights.data;
      const chosen = Array.from(results.top_experts.data, (expert, place) => [Number(expert), weights[place]]);
      chosen.sort((one, other) => other[1] - one[1]);
      const labels = chosen.map(([expert, weight]) => {
        const label = document.createElement("span");
        label.className = "expert";
        label.textContent = `${expert}: ${Math.round(100 * weight)} %`;
        return label;
      });
      row.querySelector(".chosen").replaceChildren(...labels);
    }
    return settings.classes[best];
  }
  function showNothing() {
    for (const row of rows) {
      for (const cell of [".says", ".percent"]) row.querySelector(cell).textContent = "";
      row.querySelector(".meter > span").style.width = "0";
      row.querySelectorAll(".expert").forEach((label) => label.remove());
    }
    showPixels(element("seen"), new Float32Array(width * height).map(turn));
  }
  function summarize(answers) {
    const counts = new Map();
    for (const answer of answers) counts.set(answer, (counts.get(answer) ?? 0) + 1);
    const sorted = [...counts].sort((one, other) => other[1] - one[1]);
    if (sorted.length === 1) return answers.length === 1 ? `It says ${sorted[0][0]}.` : `All ${answers.length} say ${sorted[0][0]}.`;
    return `${sorted.map(([answer, count]) => `${count} say ${answer}`).join(", ")}.`;
  }

  // One image at a time; of those that come meanwhile the last.
  let waiting = null;
  let isBusy = false;
  async function answer(pixels) {
    showPixels(element("seen"), pixels);
    waiting = pixels;
    if (isBusy) return;
    isBusy = true;
    try {
      const { engine, sessions } = await ready();
      while (waiting) {
        const current = waiting;
        const image = new engine.Tensor("float32", current, [1, 1, height, width]);
        const results = [];
        for (const session of sessions) results.push(await session.run({ pixels: image }));
        if (waiting !== null) say(summarize(results.map((result, place) => showAnswer(rows[place], result))));
        if (waiting === current) waiting = null;
      }
    } catch (error) {
      waiting = null;
      say(`This browser cannot run the models: ${error.message}`);
    } finally {
      isBusy = false;
    }
  }

  const examples = [...document.querySelectorAll("[data-pixels]")];
  const press = (pressed) => examples.forEach((button) => button.setAttribute("aria-pressed", String(button === pressed)));
  function clear() {
    waiting = null;
    pad.fillStyle = "#000000";
    pad.fillRect(0, 0, canvas.width, canvas.height);
    press(null);
    showNothing();
  }
  function answerDrawing() {
    const pixels = pixelsOfDrawing();
    if (pixels) answer(pixels);
  }
  let last = null; // where the pen was
  let isDrawing = true; // and not an example
  const placeOf = (event) => [
    (event.offsetX / canvas.clientWidth) * canvas.width,
    (event.offsetY / canvas.clientHeight) * canvas.height,
  ];
  function draw(event) {
    const place = placeOf(event);
    pad.strokeStyle = "#ffffff";
    pad.lineWidth = canvas.width / 13;
    pad.lineCap = pad.lineJoin = "round";
    pad.beginPath();
    pad.moveTo(...last);
    pad.lineTo(...place);
    pad.stroke();
    last = place;
    answerDrawing();
  }
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    if (!isDrawing) clear();
    isDrawing = true;
    last = placeOf(event);
    draw(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last) draw(event);
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (last = null));
  element("clear").addEventListener("click", () => {
    clear();
    say("Draw, and every model answers.");
  });
  for (const button of examples) {
    button.addEventListener("click", () => {
      clear();
      isDrawing = false;
      press(button);
      const pixels = Float32Array.from(bytesOf(button.dataset.pixels), (value) => value / 255);
      const small = Object.assign(document.createElement("canvas"), { width, height });
      pad.imageSmoothingEnabled = false;
      pad.drawImage(showPixels(small, pixels.map(turn)), 0, 0, canvas.width, canvas.height);
      answer(pixels);
    });
  }
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    ready().catch((error) => say(`This browser cannot run the models: ${error.message}`));
  }).observe(element("demo"));
  if (settings.isDarkOnLight) canvas.style.filter = "invert(1)";
  clear();
})();
