"""What figures are measured on."""

from __future__ import annotations

import platform
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Versions, the system, the threads that torch uses, and the GPU's name (None: there is none)."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
