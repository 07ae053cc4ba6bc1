// Search shows the lines around a hit by fetching pages, which a browser refuses for file:// addresses.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// Captions are paragraphs that begin with an emphasised "Figure:" or "Table:"; mark them so that they can be styled.
document.addEventListener("DOMContentLoaded", () => {
  for (const first of document.querySelectorAll(".bd-article p > em:first-child")) {
    if (/^(Figure|Table):/.test(first.textContent)) first.parentElement.classList.add("fb-caption");
  }
});
