"""Networks of another structure than the upload's: what was changed, in words, and how the result is written."""
