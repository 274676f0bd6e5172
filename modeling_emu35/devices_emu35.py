"""What the device at hand can do."""

import platform
import re
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether products of bfloat16 matrices are no slower than those of float32 there.

    x86 CPUs without AVX-512 convert every number: there they took 5 to 30 times as long (AMD Zen, torch 2.13).
    """
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def device_name(device: str | torch.device) -> str:
    """What those who made it call it: "NVIDIA H100 80GB HBM3", or the processor's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    found = CPU_INFO.is_file() and re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
