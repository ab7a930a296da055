// The image viewer: a dialog with zoom, pan, window, frames and images. Python (tabs/viewer.py) sends the pictures.
() => {
  const state = { seq: 0, got: 0, record: null, scale: 1, x: 0, y: 0, fit: true, windowing: false, opacity: 65 };
  let dialog, opener, timer;

  const build = () => {
    dialog = document.createElement("dialog");
    dialog.className = "mm-viewer";
    dialog.setAttribute("aria-label", "Image viewer");
    dialog.innerHTML = `
      <header><div class="mm-viewer-title"><strong></strong><span></span></div>
        <div class="mm-viewer-tools" role="toolbar" aria-label="View">
          <button type="button" data-do="previous" aria-label="Previous image" title="Previous image (Page Up)">‹</button>
          <button type="button" data-do="next" aria-label="Next image" title="Next image (Page Down)">›</button>
          <button type="button" data-do="window" aria-pressed="false" title="Drag to set the window; or drag with the right mouse button (w)">Window</button>
          <button type="button" data-do="out" aria-label="Zoom out" title="Zoom out (-)">−</button>
          <output aria-label="Zoom"></output>
          <button type="button" data-do="in" aria-label="Zoom in" title="Zoom in (+)">+</button>
          <button type="button" data-do="fit" title="Whole image (0)">Fit</button>
          <button type="button" data-do="full" title="One image pixel per screen pixel (1)">1:1</button>
          <button type="button" data-do="close" aria-label="Close" title="Close (Esc)">✕</button>
        </div></header>
      <div class="mm-panes"></div>
      <footer>
        <label data-part="frame"><span>Frame</span><input type="range" min="1" step="1" aria-label="Frame"><output></output></label>
        <label data-part="image"><span>Image</span><input type="range" min="1" step="1" aria-label="Image"><output></output></label>
        <label data-part="overlay"><span>Overlay</span><input type="range" min="0" max="100" aria-label="Overlay opacity"><output></output></label>
        <p class="mm-viewer-facts" role="status"></p>
      </footer>`;
    // Gradio prefixes the rules of style.css with this element.
    (document.querySelector(".gradio-container .contain") ?? document.querySelector(".gradio-container")).append(dialog);
    dialog.addEventListener("close", () => opener?.isConnected && opener.focus());
    dialog.addEventListener("click", (event) => {
      const button = event.target.closest("[data-do]");
      if (button) act(button.dataset.do);
    });
    dialog.addEventListener("keydown", keys);
    for (const label of dialog.querySelectorAll("[data-part]"))
      label.querySelector("input").addEventListener("input", (event) => slide(label.dataset.part, Number(event.target.value)));
    const panes = dialog.querySelector(".mm-panes");
    panes.addEventListener("wheel", wheel, { passive: false });
    panes.addEventListener("pointerdown", down);
    panes.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) panes.addEventListener(name, up);
    panes.addEventListener("contextmenu", (event) => event.preventDefault());
    panes.addEventListener("dblclick", (event) => (state.fit ? zoom(3, event) : fit()));
    new ResizeObserver(() => (state.fit ? fit() : place())).observe(panes);
  };

  // --- asking ---

  const ask = (changes) => {
    const r = state.record ?? {};
    const detail = { seq: ++state.seq, image: r.index ?? null, map: r.map ?? null, frame: r.frame ?? null, window: null, ...changes };
    window.mmViewSend?.("click", detail);
  };
  const open = (what) => {
    if (!dialog) build();
    opener = document.activeElement;
    Object.assign(state, { record: null, fit: true });
    dialog.querySelector(".mm-panes").replaceChildren();
    title("Opening…", "");
    facts();
    for (const label of dialog.querySelectorAll("[data-part]")) label.hidden = true;
    if (!dialog.open) dialog.showModal();
    const [kind, index] = what.split(":");
    ask({ image: kind === "image" && index ? Number(index) : null, map: kind === "map" ? Number(index) : null, frame: null });
  };
  window.mmViewOpen = open;

  window.mmViewShow = (text) => {
    if (!text || !dialog?.open) return;
    const record = JSON.parse(text);
    if (record.seq < state.got) return; // a later picture is here already
    state.got = record.seq;
    const first = !state.record;
    const moved = state.record && (state.record.index !== record.index || String(state.record.size) !== String(record.size));
    if (record.error) {
      title(record.error, "");
      dialog.querySelector(".mm-panes").replaceChildren();
      return;
    }
    state.record = record;
    draw(first || moved);
  };

  // --- drawing ---

  const title = (name, text) => {
    dialog.querySelector(".mm-viewer-title strong").textContent = name;
    dialog.querySelector(".mm-viewer-title span").textContent = text;
  };
  const draw = (again) => {
    const r = state.record;
    const panes = dialog.querySelector(".mm-panes");
    const kept = [...panes.children];
    if (kept.length !== r.panes.length || again) {
      panes.replaceChildren(...r.panes.map(pane));
    }
    r.panes.forEach((p, i) => {
      const [under, over] = panes.children[i].querySelectorAll("img");
      under.src = p.file ?? p.src;
      if (p.over) over.src = p.over; else over?.removeAttribute("src");
      panes.children[i].querySelector("figcaption").textContent = r.panes.length > 1 ? [p.name, p.text].filter(Boolean).join(". ") : "";
    });
    const size = `${r.size[0]} × ${r.size[1]} pixels` + (r.shown[0] < r.size[0] && !r.quick ? `, shown at ${r.shown[0]} × ${r.shown[1]}` : "");
    const place_ = r.count > 1 ? `image ${r.index + 1} of ${r.count}, ` : "";
    title(r.title, place_ + size);
    part("frame", r.frames > 1, r.frames, r.frame + 1);
    part("image", r.count > 1, r.count, r.index + 1);
    part("overlay", r.panes.some((p) => p.over), 100, state.opacity);
    for (const name of ["previous", "next"]) button(name).hidden = r.count < 2;
    button("window").hidden = !r.window;
    if (!r.window) toggle(false);
    facts();
    dialog.style.setProperty("--mm-opacity", state.opacity / 100);
    if (again || state.fit) fit(); else place();
    // A button that had the focus may be hidden now; keys go to what has it.
    if (!dialog.contains(document.activeElement) || document.activeElement.hidden) panes.firstChild.focus({ preventScroll: true });
  };
  const pane = () => {
    const figure = document.createElement("figure");
    figure.className = "mm-pane";
    figure.tabIndex = 0;
    figure.setAttribute("role", "img");
    figure.setAttribute("aria-label", "Image: drag to move, scroll to zoom");
    figure.innerHTML = '<div class="mm-canvas"><img alt="" draggable="false"><img alt="" class="mm-over" draggable="false"></div><div class="mm-scale" hidden><span></span><i></i></div><figcaption></figcaption>';
    return figure;
  };
  const part = (name, shown, most, value) => {
    const label = dialog.querySelector(`[data-part=${name}]`);
    label.hidden = !shown;
    const input = label.querySelector("input");
    input.max = most;
    if (document.activeElement !== input) input.value = value;
    label.querySelector("output").textContent = name === "overlay" ? `${value} %` : `${value} of ${most}`;
  };
  const button = (name) => dialog.querySelector(`[data-do=${name}]`);
  const number = (value) => (Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
  const facts = () => {
    const r = state.record;
    const said = [];
    const w = state.dragged ?? r?.window;
    if (w) said.push(`Window ${number(w.level)} / ${number(w.width)}${r.window.unit ? " " + r.window.unit : ""}`);
    if (r?.scale) said.push(r.scale.text);
    dialog.querySelector(".mm-viewer-facts").textContent = said.join(" · ");
  };

  // --- zoom and pan: the same part of the image in every pane ---

  const natural = () => {
    const [w, h] = state.record.size;
    return [w, h * (state.record.scale?.ratio ?? 1)]; // pixels need not be square
  };
  const room = () => dialog.querySelector(".mm-pane")?.getBoundingClientRect();
  const fit = () => {
    const box = room();
    if (!box || !state.record) return;
    const [w, h] = natural();
    state.scale = Math.min(box.width / w, (box.height - 26) / h);
    state.x = (box.width - w * state.scale) / 2;
    state.y = (box.height - 26 - h * state.scale) / 2;
    state.fit = true;
    place();
  };
  const zoom = (factor, event) => {
    const box = room();
    if (!box || !state.record) return;
    const pane_ = event?.target?.closest?.(".mm-pane")?.getBoundingClientRect() ?? box;
    const at = event?.clientX === undefined ? [box.width / 2, box.height / 2] : [event.clientX - pane_.left, event.clientY - pane_.top];
    const [w] = natural();
    const next = Math.min(Math.max(state.scale * factor, Math.min(box.width / w, 1) / 4), 64);
    state.x = at[0] - ((at[0] - state.x) * next) / state.scale;
    state.y = at[1] - ((at[1] - state.y) * next) / state.scale;
    state.scale = next;
    state.fit = false;
    place();
  };
  const pan = (dx, dy) => {
    state.x += dx;
    state.y += dy;
    state.fit = false;
    place();
  };
  const place = () => {
    const box = room();
    if (!box || !state.record) return;
    const [w, h] = natural();
    // Some of the image stays in sight.
    state.x = Math.min(Math.max(state.x, 40 - w * state.scale), box.width - 40);
    state.y = Math.min(Math.max(state.y, 40 - h * state.scale), box.height - 40);
    for (const canvas of dialog.querySelectorAll(".mm-canvas")) {
      canvas.style.width = `${w * state.scale}px`;
      canvas.style.height = `${h * state.scale}px`;
      canvas.style.transform = `translate(${state.x}px, ${state.y}px)`;
      canvas.classList.toggle("mm-sharp", state.scale >= 3);
    }
    dialog.querySelector("header output").textContent = `${Math.round(100 * state.scale)} %`;
    bar();
  };
  const bar = () => {
    const scale = state.record.scale;
    const length = scale && (120 * scale.mm * (state.record.shown[0] / state.record.size[0])) / state.scale; // mm in 120 screen pixels
    const power = length && 10 ** Math.floor(Math.log10(length));
    const mm = length && power * [5, 2, 1].find((m) => m * power <= length);
    for (const found of dialog.querySelectorAll(".mm-scale")) {
      found.hidden = !scale;
      if (!scale) continue;
      found.querySelector("i").style.width = `${(120 * mm) / length}px`;
      const text = mm >= 10 ? `${mm / 10} cm` : mm >= 1 ? `${mm} mm` : `${Number((mm * 1000).toPrecision(2))} µm`;
      found.querySelector("span").textContent = scale.plane === "in the patient" ? text : `${text} ${scale.plane}`;
    }
  };

  // --- mouse, fingers, keys ---

  const pointers = new Map();
  const wheel = (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event);
  };
  const down = (event) => {
    if (!event.target.closest(".mm-pane")) return;
    event.target.closest(".mm-panes").setPointerCapture(event.pointerId);
    const windowing = state.record?.window && (event.button === 2 || (state.windowing && event.button === 0));
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, windowing, target: event.target });
  };
  const move = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.x, dy = event.clientY - before.y;
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
    Object.assign(before, { x: event.clientX, y: event.clientY });
    if (others.length) {
      const other = others[0];
      const now = Math.hypot(before.x - other.x, before.y - other.y);
      const then = Math.hypot(before.x - dx - other.x, before.y - dy - other.y);
      if (then > 0) zoom(now / then, { clientX: (before.x + other.x) / 2, clientY: (before.y + other.y) / 2, target: before.target });
    } else if (before.windowing) shiftWindow(dx, dy);
    else pan(dx, dy);
  };
  const up = (event) => {
    const before = pointers.get(event.pointerId);
    pointers.delete(event.pointerId);
    if (before?.windowing && state.dragged) keepWindow();
  };
  // A drag across the image is one range of its values: right is wider, up is brighter (a lower level).
  const shiftWindow = (dx, dy) => {
    const w = state.record.window;
    const range = w.high - w.low || 1;
    // A window far wider than the values, such as that of a whole data type, would take metres to narrow.
    const start = { level: Math.min(Math.max(w.level, w.low), w.high), width: Math.min(w.width, 1.2 * range) };
    const now = state.dragged ?? start;
    const step = Math.max(Math.min(range, 4 * now.width), range / 50) / 400;
    const least = range / 1000;
    state.dragged = { level: now.level + dy * step, width: Math.max(now.width + dx * step, least) };
    facts();
    if (!timer) timer = setTimeout(() => {
      timer = null;
      if (state.dragged) ask({ window: [state.dragged.level, state.dragged.width], quick: true });
    }, 90);
  };
  const keepWindow = () => {
    clearTimeout(timer);
    timer = null;
    const window_ = [state.dragged.level, state.dragged.width];
    state.dragged = null;
    ask({ window: window_ });
    if (state.record.applies) window.mmViewSend?.("submit", { seq: state.seq, window: window_, frame: state.record.frame });
  };
  const slide = (name, value) => {
    if (name === "overlay") {
      state.opacity = value;
      dialog.style.setProperty("--mm-opacity", value / 100);
      part("overlay", true, 100, value);
    } else if (name === "image") step(value - 1 - state.record.index);
    else toFrame(value - 1);
  };
  const step = (by) => {
    const r = state.record;
    const to = r && Math.min(Math.max(r.index + by, 0), r.count - 1);
    if (!r || to === r.index) return;
    r.index = to;
    part("image", true, r.count, to + 1);
    ask({ image: to, map: null, frame: null });
    document.querySelectorAll("#mm-batch [data-mm-index]").forEach((row) => row.dataset.mmIndex === String(to) && row.click());
  };
  const toFrame = (to) => {
    const r = state.record;
    if (!r || r.frames < 2 || to < 0 || to >= r.frames) return;
    r.frame = to;
    part("frame", true, r.frames, to + 1);
    const w = r.window;
    ask({ frame: to, window: w && r.applies ? [w.level, w.width] : null });
    clearTimeout(state.applying);
    if (r.applies) state.applying = setTimeout(() => window.mmViewSend?.("submit", { seq: state.seq, frame: to }), 400);
  };
  const toggle = (on) => {
    state.windowing = on;
    button("window").setAttribute("aria-pressed", String(on));
    dialog.classList.toggle("mm-windowing", on);
  };
  const act = (name) => {
    const actions = {
      close: () => dialog.close(), fit, in: () => zoom(1.4), out: () => zoom(1 / 1.4),
      full: () => zoom(1 / state.scale), previous: () => step(-1), next: () => step(1), window: () => toggle(!state.windowing),
    };
    actions[name]?.();
  };
  const keys = (event) => {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey || !state.record) return;
    const actions = {
      "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: fit, 1: () => act("full"),
      ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
      PageUp: () => step(-1), PageDown: () => step(1), ",": () => toFrame(state.record.frame - 1), ".": () => toFrame(state.record.frame + 1),
      w: () => state.record.window && toggle(!state.windowing),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  };

  document.addEventListener("click", (event) => {
    const found = event.target.closest("[data-mm-view]");
    if (found) open(found.dataset.mmView);
  });
}
