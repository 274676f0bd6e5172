"""What the device at hand can do."""

import platform

import torch


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether products of bfloat16 matrices are no slower than those of float32 there.

    x86 CPUs without AVX-512 convert every number: there they took 5 to 30 times as long (AMD Zen, torch 2.13).
    """
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
