// Not a module: it has to run before the first paint, which a module would come after.
"use strict";

(() => {
  const NAME = "sfs-theme";
  const root = document.documentElement;

  const saved = () => {
    try {
      return localStorage.getItem(NAME);
    } catch { // storage is switched off
      return null;
    }
  };

  const apply = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };

  apply(saved());
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = root.dataset.theme ?? "system";
    select.addEventListener("change", () => {
      apply(select.value);
      try {
        localStorage.setItem(NAME, select.value);
      } catch { /* it holds until the page is left */ }
    });
  });
})();
