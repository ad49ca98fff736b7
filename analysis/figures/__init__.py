"""One script per figure; each writes vector output and the data as CSV beside it."""
