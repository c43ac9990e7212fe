"""`parallelflow reproduce`: every claim of the paper, measured. One file a part."""
