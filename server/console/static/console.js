// Two conveniences; every page works without them: parts of a page stay fresh, and the policy form
// says what an alpha comes to while it is typed.
"use strict";

const REFRESH_MS = 3000;

async function refresh() {
  const shown = document.getElementById("live");
  try {
    const url = new URL(location.href);
    url.searchParams.delete("done"); // the message of a change is said once
    url.hash = "";
    const answer = await fetch(url, { redirect: "error", headers: { accept: "text/html" } });
    if (!answer.ok) throw new Error(String(answer.status));
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      // What somebody is on is not replaced under their fingers.
      if (fresh === null || old.contains(document.activeElement)) continue;
      if (old.innerHTML !== fresh.innerHTML) old.replaceWith(document.importNode(fresh, true));
    }
    if (shown.textContent !== "") shown.textContent = "";
  } catch {
    const text = "Not refreshed: the server does not answer. What you see is older.";
    if (shown.textContent !== text) shown.textContent = text;
  }
}

function startRefreshing() {
  // A page that answers a form is not asked for again: its address may know no GET.
  if (document.querySelector("[data-live]") === null || !document.body.dataset.refreshes) return;
  setInterval(() => {
    if (!document.hidden) refresh();
  }, REFRESH_MS);
}

function startReadout() {
  const alpha = document.getElementById("alpha");
  const place = document.getElementById("alpha-readout");
  if (alpha === null || place === null) return;
  const most = document.getElementById("alpha_max");
  const mode = document.getElementById("mode");
  const dose = document.getElementById("max_relative_dose");
  const schedule = document.getElementById("schedule");
  const alias = document.getElementById("vector_alias");
  const meter = document.getElementById("alpha-meter");
  const text = document.getElementById("alpha-text");
  const { inForce, relative, layer } = place.dataset;
  const firstAlias = alias.value;

  function tell() {
    const value = Number(alpha.value);
    const parts = [];
    if (alpha.value === "" || !Number.isFinite(value)) {
      text.textContent = "";
      return;
    }
    const change = Number((value - Number(inForce)).toPrecision(6));
    if (mode.value === "off") parts.push("mode off: nothing is subtracted");
    else if (value === 0) parts.push("an exact no-op");
    else if (change === 0) parts.push("as in force");
    else parts.push(`${change > 0 ? "stronger" : "weaker"} by ${Math.abs(change)} than in force`);
    if (value > Number(most.value)) parts.push("over the largest alpha");
    const isKnown = relative !== undefined && mode.value === "dataset" && value > 0;
    if (isKnown && schedule.value === "all" && alias.value === firstAlias) {
      const most_moved = value * Number(relative);
      const cap = Number(dose.value);
      parts.push(`moves layer ${layer} most, by ${most_moved.toFixed(3)} of its state`);
      if (most_moved > cap) parts.push(`over the largest dose ${cap}: requests would be refused`);
    }
    meter.max = Number(most.value) || 1;
    meter.value = value;
    text.textContent = `${alpha.value}: ${parts.join("; ")}`;
  }

  for (const input of [alpha, most, mode, dose, schedule, alias]) {
    input.addEventListener("input", tell);
  }
  place.hidden = false;
  alpha.closest(".field").append(place);
  tell();
}

startRefreshing();
startReadout();
