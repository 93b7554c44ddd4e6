"""Settings of the kernel tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
