// The API key: kept for this tab and until it is closed, and sent to this server only.

const NAME = "sfs-key";
let kept = null; // where there is no session storage

export function key() {
  try {
    return sessionStorage.getItem(NAME) ?? kept;
  } catch {
    return kept;
  }
}

export function keep(value) {
  kept = value;
  try {
    sessionStorage.setItem(NAME, value);
  } catch { /* it holds until the page is left */ }
}
