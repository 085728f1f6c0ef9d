// A browser does not let a page that was opened from a file read others, so results of a search come without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
