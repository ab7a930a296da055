// Folders that are dropped or chosen: packed as a zip in the browser, so that class folders keep their names, which
// uploads of single files lose. Several images without labels are given as they are.
() => {
  const ZONES = { "mm-labelled": true, "mm-compared": true, "mm-zip": true, "mm-drop": false }; // packed or not
  const MOST = 60000; // files in a zip without extensions of the format
  const hidden = (path) => path.split("/").some((part) => part.startsWith(".") || part === "__MACOSX" || part === "Thumbs.db");

  const table = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  const crc32 = (bytes) => {
    let crc = 0xffffffff;
    for (let i = 0; i < bytes.length; i++) crc = table[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
    return (crc ^ 0xffffffff) >>> 0;
  };
  const numbers = (...fields) => { // [bytes, value] in little-endian order
    const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
    let at = 0;
    for (const [size, value] of fields) {
      if (size === 2) view.setUint16(at, value, true);
      else view.setUint32(at, value, true);
      at += size;
    }
    return view.buffer;
  };

  // A zip archive without compression: images are compressed already.
  const zip = async (files, name) => {
    const parts = [], entries = [];
    let offset = 0;
    for (const [path, file] of files) {
      const text = new TextEncoder().encode(path);
      const crc = crc32(new Uint8Array(await file.arrayBuffer()));
      // Version, UTF-8 names, stored, 1 January 1980.
      const fields = [[2, 20], [2, 0x0800], [2, 0], [2, 0], [2, 33], [4, crc], [4, file.size], [4, file.size], [2, text.length], [2, 0]];
      parts.push(numbers([4, 0x04034b50], ...fields), text, file);
      entries.push(numbers([4, 0x02014b50], [2, 20], ...fields, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), text);
      offset += 30 + text.length + file.size;
    }
    const size = entries.reduce((sum, part) => sum + part.byteLength, 0);
    const count = files.length;
    const end = numbers([4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]);
    return new File([...parts, ...entries, end], `${name}.zip`, { type: "application/zip" });
  };

  const read = async (entry, found) => {
    if (entry.isFile) {
      found.push([entry.fullPath.replace(/^\//, ""), await new Promise((done, failed) => entry.file(done, failed))]);
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a reader returns at most 100 entries at a time
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) return;
      for (const other of some) await read(other, found);
    }
  };

  const say = (zone, text) => {
    const said = document.querySelector(`[data-mm-folder="${zone}"] + [role=status]`);
    if (said) said.textContent = text;
  };

  const give = async (zone, all, name) => {
    const files = all.filter(([path]) => !hidden(path));
    const input = document.querySelector(`#${zone} input[type=file]`);
    const largest = Number(document.querySelector(`[data-mm-folder="${zone}"]`)?.dataset.mmLargest ?? 64);
    const size = files.reduce((sum, [, file]) => sum + file.size, 0) / 2 ** 20;
    if (!files.length) return say(zone, "The folder is empty.");
    if (!input) return say(zone, "Remove the file above first.");
    if (ZONES[zone] && (size > largest || files.length > MOST))
      return say(zone, `The folder holds ${files.length} files, ${size.toFixed(0)} MB; at most ${largest} MB are possible here.`);
    say(zone, `Reading ${files.length} files…`);
    const transfer = new DataTransfer();
    if (ZONES[zone]) transfer.items.add(await zip(files, name || "folder"));
    else files.forEach(([, file]) => transfer.items.add(file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    say(zone, "");
  };
  const failed = (zone) => (problem) => say(zone, `The folder cannot be read: ${problem.message ?? problem}`);

  document.addEventListener("drop", (event) => {
    const zone = Object.keys(ZONES).find((id) => event.target.closest?.(`#${id}`));
    const entries = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const folders = entries.filter((entry) => entry.isDirectory);
    if (!zone || !folders.length) return; // files alone are handled by Gradio
    event.preventDefault();
    event.stopPropagation();
    document.querySelector(`#${zone}`).dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
    const all = [];
    (async () => {
      for (const entry of entries) await read(entry, all);
      await give(zone, all, folders.length === 1 ? folders[0].name : "folders");
    })().catch(failed(zone));
  }, true);

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-mm-folder]");
    if (!button) return;
    const zone = button.dataset.mmFolder;
    const chooser = Object.assign(document.createElement("input"), { type: "file", webkitdirectory: true, multiple: true });
    chooser.addEventListener("change", () => {
      const all = [...chooser.files].map((file) => [file.webkitRelativePath, file]);
      give(zone, all, all[0]?.[0].split("/")[0]).catch(failed(zone));
    });
    chooser.click();
  });
}
