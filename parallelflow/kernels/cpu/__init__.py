"""The kernels for a CPU, in C++: compiled once on the machine that runs them, for exactly that machine."""
