// Search shows the lines around a hit by fetching pages, which a browser refuses for file:// addresses.
if (location.protocol === "file:" && window.DOCUMENTATION_OPTIONS) {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
