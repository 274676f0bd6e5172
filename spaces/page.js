// The address of the page holds the tab and its settings, so that a link shows the same to others.
function emu35Share(tab, names, values) {
  // Of what was in it, only how it looks is for others: a private Space has its visitor's key there (__sign).
  const theme = new URLSearchParams(location.search).get("__theme");
  const query = new URLSearchParams(theme === null ? {} : { __theme: theme });
  query.set("tab", tab);
  names.forEach((name, place) => {
    const value = values[place];
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  });
  history.replaceState(null, "", location.pathname + "?" + query);
  // A Space lives in a frame: the page around it shows the same address.
  if (window.parent !== window) window.parent.postMessage({ queryString: query.toString() }, "https://huggingface.co");
}

// Gradio tells of the first tab that it shows, too, and before the address was read: only what a visitor does counts.
let emu35Used = false;
for (const event of ["pointerdown", "keydown"]) addEventListener(event, () => (emu35Used = true), { capture: true });
function emu35Tab(tab) {
  if (emu35Used) emu35Share(tab, [], []);
}

// Without those parameters that are not for others, whether or not anything was shared before.
function emu35Address() {
  const inFrame = window.parent !== window && document.referrer.startsWith("https://huggingface.co/spaces/");
  const address = new URL(inFrame ? document.referrer : location.href);
  address.search = location.search;
  for (const name of [...address.searchParams.keys()])
    if (name.startsWith("__") && name !== "__theme") address.searchParams.delete(name);
  return address.href;
}

// Returns what the button says then.
async function emu35CopyLink() {
  const address = emu35Address();
  let copied = false;
  try {
    await navigator.clipboard.writeText(address); // there on https and localhost only
    copied = true;
  } catch {
    const field = document.createElement("textarea");
    field.value = address;
    document.body.append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
  }
  if (!copied) window.prompt("The link", address);
  emu35Say(copied ? "Link copied" : "");
  return copied ? "Copied" : "Copy link";
}

const emu35Later = (value) => new Promise((done) => setTimeout(() => done(value), 2000));

// Tells those who hear the page.
function emu35Say(text) {
  let live = document.getElementById("emu35-said");
  if (!live) {
    live = document.createElement("div");
    live.id = "emu35-said";
    live.className = "only-for-screen-readers";
    live.setAttribute("role", "status");
    document.body.append(live);
  }
  live.textContent = text;
}

function emu35Shade() {
  document.body.classList.toggle("dark");
}

// What gradio leaves without a name or a role for those who hear the page: pictures that are buttons, empty places,
// and folded thoughts and messages, which are a button within a button.
function emu35Name(root) {
  for (const image of root.querySelectorAll("button:not([aria-label]) img")) {
    const label = image.closest(".block")?.querySelector("[data-testid=block-label]");
    image.closest("button").setAttribute("aria-label", label?.textContent.trim() || "Picture");
  }
  for (const outer of root.querySelectorAll("div.title[role=button], div.toast-header[role=button]")) {
    outer.querySelector("button[aria-label='']")?.setAttribute("aria-label", outer.textContent.trim());
    if (!outer.querySelector("button")) continue;
    outer.removeAttribute("role");
    outer.removeAttribute("tabindex");
  }
  for (const empty of root.querySelectorAll("div.empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
}

function emu35Watch() {
  emu35Name(document);
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      emu35Name(document);
    });
  }).observe(document.body, { childList: true, subtree: true });
}
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", emu35Watch);
else emu35Watch();
