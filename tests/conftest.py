"""One thread a process: the tests run in parallel processes, and small shapes gain nothing from threads."""

import torch

torch.set_num_threads(1)
