// Page behaviour beyond Gradio: pasted files, sortable tables, overlay opacity, light and dark mode.
() => {
  const later = (search, then, tries = 40) => {
    const found = document.querySelector(search);
    if (found) then(found);
    else if (tries) setTimeout(() => later(search, then, tries - 1), 100);
  };

  const tabButtons = () => [...document.querySelectorAll(".mm-tabs > .tab-wrapper [role=tab]")].filter((tab) => !tab.disabled && tab.offsetParent);
  const slug = (tab) => tab.textContent.trim().toLowerCase().replace(/[^a-z0-9]+/g, "-");

  // Pasted images are handled like dropped ones.
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    const input = ["#mm-drop", "#mm-segment-drop"]
      .filter((drop) => document.querySelector(drop)?.offsetParent)
      .map((drop) => document.querySelector(`${drop} input[type=file]`))[0];
    if (!files.length || !input) return;
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

  // Scroll to the answer: on a narrow page, below the controls; elsewhere, and `opened` from a table, if out of view.
  window.mmShowAnswer = (opened = false, where = "") => {
    const found = document.querySelector(where || (opened ? "#mm-result" : "#mm-result, #mm-batch"));
    const top = found?.getBoundingClientRect().top;
    if (top < 0 || top > 0.6 * window.innerHeight || (!opened && window.innerWidth <= 900))
      found?.scrollIntoView({ behavior: "smooth", block: "start" });
  };

  // Arrow keys, Home and End move between tabs, as the ARIA pattern for tabs demands; past the last comes the first.
  document.addEventListener("keydown", (event) => {
    const tab = event.target.closest?.("[role=tab]");
    if (!tab) return;
    const tabs = tabButtons();
    const at = tabs.findIndex((other) => slug(other) === slug(tab));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    event.stopPropagation(); // Gradio moves too, and would do it a second time
    const next = slug(tabs[(to + tabs.length) % tabs.length]);
    tabs[(to + tabs.length) % tabs.length].click();
    setTimeout(() => tabButtons().find((other) => slug(other) === next)?.focus(), 60);  // Gradio draws the tabs again
  }, true);
  // Tab leaves an open menu and closes it; otherwise it stays over the page.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || !event.target.matches?.("input[role=combobox], input[role=listbox]")) return;
    const input = event.target;
    setTimeout(() => { if (document.activeElement !== input) input.blur(); input.dispatchEvent(new FocusEvent("blur")); }, 0);
  });

  // Up and down move through the images of a batch.
  document.addEventListener("keydown", (event) => {
    const row = event.target.closest?.("#mm-batch [data-mm-index], #mm-embedding [data-mm-index]");
    if (row && (event.key === "Enter" || event.key === " ") && row.tagName !== "BUTTON") {
      event.preventDefault();
      row.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    }
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!row || !by) return;
    event.preventDefault();
    const rows = [...document.querySelectorAll("#mm-batch button[data-mm-index]")];
    const next = rows[rows.findIndex((other) => other.dataset.mmIndex === row.dataset.mmIndex) + by];
    if (next) {
      next.focus();
      next.click();
    }
  });
  document.addEventListener("click", (event) => {
    const picked = event.target.closest("#mm-batch [data-mm-index], #mm-embedding [data-mm-index]");
    if (!picked) return;
    for (const other of document.querySelectorAll("#mm-batch [data-mm-index], #mm-embedding [data-mm-index]"))
      other.toggleAttribute("data-mm-current", other.dataset.mmIndex === picked.dataset.mmIndex);
  });

  // The address names the tab and the model, so that a link leads back here; the back button works.
  const DEFAULT_TAB = "classify";
  let moving = true; // the page follows the address, not the reverse
  const address = (changes) => {
    if (moving) return;
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(changes)) {
      if (name === "model" && value.startsWith("Yours: ")) query.delete(name); // nobody else has it
      else query.set(name, value);
    }
    const text = query.toString().replaceAll("%2F", "/");
    if (`?${text}` !== location.search) history.pushState(null, "", `?${text}`);
  };
  window.mmAddress = address;
  // On a narrow page Gradio moves the last tabs into a menu.
  const menuTabs = () => [...document.querySelectorAll(".mm-tabs > .tab-wrapper .overflow-dropdown > button")];
  const selectedTab = () =>
    tabButtons().find((tab) => tab.getAttribute("aria-selected") === "true")
    ?? menuTabs().find((tab) => tab.classList.contains("selected"));
  const follow = (start = false) => {
    const query = new URLSearchParams(location.search);
    moving = true;
    const wanted = query.get("tab")?.toLowerCase().replace(/[^a-z0-9]+/g, "-") ?? (start ? null : DEFAULT_TAB);
    const tabs = [...tabButtons(), ...menuTabs()];
    const tab = tabs.find((other) => slug(other) === wanted || slug(other).replace("-", "") === wanted);
    if (tab && tab !== selectedTab()) tab.click();
    const model = query.get("model") ?? startModel;
    if (model && model !== shownModel) window.mmChooseModel?.(model);
    setTimeout(() => {
      moving = false;
      const now = wanted ? null : selectedTab(); // somebody chose a tab before the page was ready
      if (now && slug(now) !== DEFAULT_TAB) address({ tab: slug(now) });
    }, 800);
  };
  let startModel, shownModel;
  window.mmModel = (title, first) => {
    shownModel = title;
    if (first) startModel = title;
    else address({ model: title });
  };
  window.addEventListener("popstate", () => follow());
  later(".mm-tabs > .tab-wrapper", (bar) => {
    let selected = DEFAULT_TAB;
    new MutationObserver(() => {
      const now = selectedTab();
      if (!now || slug(now) === selected) return;
      selected = slug(now);
      address({ tab: selected });
    }).observe(bar, { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-selected", "class"] });
  });
  const begin = (tries = 50) => {
    if (!tries) return;
    if (!window.mmChooseModel || !startModel || !tabButtons().length) return void setTimeout(() => begin(tries - 1), 100);
    follow(true);
  };
  begin();

  // Before results or a running job are lost, the browser asks. A model that was downloaded is not lost.
  const WORK = "#mm-maps .mm-map, #mm-batch .mm-batch, #mm-training .mm-progress, #mm-training .mm-results, [data-mm-work]";
  let saved = null;
  document.addEventListener("click", (event) => {
    if (event.target.closest("#mm-download-model")) saved = document.querySelector("#mm-training .mm-results");
  });
  window.addEventListener("beforeunload", (event) => {
    const work = [...document.querySelectorAll(WORK)].filter((found) => found !== saved);
    if (work.length) event.preventDefault();
  });

  later("#mm-drop input[type=file]", (input) => input.setAttribute("aria-label", "Choose images"));
  later("#mm-segment-drop input[type=file]", (input) => input.setAttribute("aria-label", "Choose an image to segment"));

  // `?example` in the URL (set by `--open`) classifies the first example without a click.
  const pickFirst = (button, tries = 10) => {
    if (!tries || document.querySelector("#mm-result .mm-answer")) return;
    button.click();
    setTimeout(() => pickFirst(button, tries - 1), 2000);  // Gradio may not have attached its listener yet
  };
  if (new URLSearchParams(location.search).has("example")) later("#mm-examples [data-mm-example]", pickFirst);
}
