// Page behaviour beyond Gradio: pasted files, sortable tables, overlay opacity, light and dark mode.
() => {
  const later = (search, then, tries = 40) => {
    const found = document.querySelector(search);
    if (found) then(found);
    else if (tries) setTimeout(() => later(search, then, tries - 1), 100);
  };

  // Pasted images are handled like dropped ones.
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    const input = document.querySelector("#mm-drop input[type=file]");
    if (!files.length || !input || !input.offsetParent && !input.closest("#mm-drop")?.offsetParent) return;
    event.preventDefault();
    const transfer = new DataTransfer();
    files.forEach((file) => transfer.items.add(file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-mm-theme]")) {
      const dark = document.body.classList.toggle("dark");
      try { localStorage.setItem("mm-theme", dark ? "dark" : "light"); } catch { /* unavailable in private windows */ }
    }
    const sorter = event.target.closest("[data-mm-sort]");
    if (sorter) sort(sorter.closest("th"));
  });
  try {
    const kept = localStorage.getItem("mm-theme");
    if (kept) document.body.classList.toggle("dark", kept === "dark");
  } catch { /* unavailable in private windows */ }

  const sort = (head) => {
    const table = head.closest("table");
    const column = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.children[column];
      return cell.querySelector("[data-mm-value]")?.dataset.mmValue ?? cell.textContent.trim();
    };
    const order = new Intl.Collator(undefined, { numeric: true });
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return (up ? 1 : -1) * (numbers ? x - y : order.compare(x, y));
    };
    const body = table.tBodies[0];
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  };

  // Overlay opacity is a CSS variable: no server request.
  document.addEventListener("input", (event) => {
    if (!event.target.matches("[data-mm-opacity]")) return;
    const root = event.target.closest(".mm-maps");
    root.style.setProperty("--mm-opacity", event.target.value / 100);
    event.target.nextElementSibling.value = `${event.target.value} %`;
  });

  // Scroll to the answer: on a narrow page, below the controls; `opened` from a table, if it is out of view.
  window.mmShowAnswer = (opened = false) => {
    const found = document.querySelector(opened ? "#mm-result" : "#mm-result, #mm-batch");
    const top = found?.getBoundingClientRect().top;
    if (opened ? top < 0 || top > 0.6 * window.innerHeight : window.innerWidth <= 900)
      found?.scrollIntoView({ behavior: "smooth", block: "start" });
  };

  // Arrow keys, Home and End move between tabs, as the ARIA pattern for tabs demands.
  document.addEventListener("keydown", (event) => {
    const tab = event.target.closest?.("[role=tab]");
    const list = tab?.closest("[role=tablist]");
    if (list) {
      const tabs = [...list.querySelectorAll("[role=tab]")].filter((other) => !other.disabled);
      const at = tabs.indexOf(tab);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs[(to + tabs.length) % tabs.length];
      next.click();
      next.focus();
      setTimeout(() => document.getElementById(next.id)?.focus(), 60);  // Gradio draws the tabs again
    }
  });
  // Tab leaves an open menu and closes it; otherwise it stays over the page.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || !event.target.matches?.("input[role=listbox], input[aria-haspopup=listbox]")) return;
    const input = event.target;
    setTimeout(() => { if (document.activeElement !== input) input.blur(); input.dispatchEvent(new FocusEvent("blur")); }, 0);
  });

  later("#mm-drop input[type=file]", (input) => input.setAttribute("aria-label", "Choose images"));

  // `?example` in the URL (set by `--open`) classifies the first example without a click.
  const pickFirst = (button, tries = 10) => {
    if (!tries || document.querySelector("#mm-result .mm-answer")) return;
    button.click();
    setTimeout(() => pickFirst(button, tries - 1), 2000);  // Gradio may not have attached its listener yet
  };
  if (new URLSearchParams(location.search).has("example")) later("#mm-examples [data-mm-example]", pickFirst);
}
