"""What all tests share: one thread a process, examples that are the same in every run, and, without a GPU, Triton's
interpreter, which has to be chosen before anything imports Triton (the language's own functions are defined then)."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tests run in parallel processes, and small shapes gain nothing from threads

# Hypothesis draws the same examples each time; HYPOTHESIS_PROFILE=explore draws new ones, and more of them.
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, database=None, **quiet)
settings.register_profile("explore", max_examples=1000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
