"""What kind of device a tensor is on, as the tables of stored configurations name it."""

from __future__ import annotations

import torch


def architecture(device: torch.device) -> str:
    """The table's name of a device; an unknown one gets the most modest configuration of its vendor."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")
