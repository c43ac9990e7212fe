"""What `parallelflow demo` runs: every model against its recurrence, a language model, and state tracking.

command.py         the command and its options
inputs.py          tensors for every function
agreement.py       every function against its recurrence: the same numbers, and how much sooner
recurrences.py     the recurrences: plain loops over tokens
corpus.py          bytes to train on
language_model.py  a byte-level language model on the gated delta rule
training.py        its training, and what it says afterwards
state_tracking.py  products of permutations: one Householder factor a token against two
plots.py           the plots
run.py             the three parts in order, with progress bars, tables and files
"""
