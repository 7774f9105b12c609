"""How fast a run is: what a record says of the steps since the one before."""

from __future__ import annotations

import resource

import torch

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that occurs in the device's counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


class Throughput:
    """Sums over the steps since the last record.

    Args:
        tokens_per_step: tokens of the global batch.
        flops_per_token: see model.training_flops_per_token.
        num_devices: processes of the whole run.
        device: this process's.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, num_devices: int, device: torch.device):
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        self._num_devices, self._device = num_devices, device
        self._peak_flops = None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak_flops = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        self.start_again()

    def start_again(self) -> None:
        """Forget the steps since the last record."""
        self._steps, self._loss_sum = 0, 0.0
        self._step_s = self._data_wait_s = self._checkpoint_stall_s = 0.0

    def add_step(self, loss: float, step_s: float, data_wait_s: float) -> None:
        self._steps += 1
        self._loss_sum += loss
        self._step_s += step_s
        self._data_wait_s += data_wait_s

    def add_checkpoint_stall(self, stall_s: float) -> None:
        self._checkpoint_stall_s += stall_s

    def record(self, steps_left: int) -> dict[str, float | None]:
        """Mean loss and speed since the last call; the sums start again."""
        step_s = self._step_s / self._steps
        tokens_per_s = self._steps * self._tokens_per_step / self._step_s
        per_device = tokens_per_s / self._num_devices
        values = {
            "loss": self._loss_sum / self._steps,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": per_device,
            "mfu": self._flops_per_token * per_device / self._peak_flops if self._peak_flops else None,
            "step_s": step_s,
            "data_wait_s": self._data_wait_s / self._steps,
            "checkpoint_stall_s": self._checkpoint_stall_s,
            "memory_peak_bytes": self._memory_peak_bytes(),
            "eta_s": step_s * steps_left,
        }
        self.start_again()
        return values

    def _memory_peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
