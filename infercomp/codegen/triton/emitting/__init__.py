"""One module for each group of families: from a spec to the text of its kernel function."""
