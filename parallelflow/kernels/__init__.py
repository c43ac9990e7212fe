"""GPU twins of (solver, aggregate, readout): the only package that imports Triton, and only when asked for."""
