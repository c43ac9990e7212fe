"""GPU twins of (solver, aggregate, readout).  The only package that imports Triton; nothing is imported until asked for."""
