"""float8 for the blocks' linear layers: torchao's tensorwise recipe, with weights gathered in float8 under FSDP2.

Weights and optimizer stay in float32, and their names what they are; output layer, embedding and norms compute in
bfloat16. Inputs and weights of a linear layer are scaled to e4m3, gradients to e5m2, each tensor by its own largest
value (Micikevicius et al., arXiv:2209.05433), and multiplied in float8; on a CPU the same values are multiplied in
float32.

Evaluation is in bfloat16 altogether, as that of the exported model will be. FSDP2 knows one way to gather a weight and
keeps buffers for it, so it gathers in float8 there too. Nobody reads that: before a block computes, its weights are
gathered once more, in bfloat16.

torchao is an extra: parallelism.py imports this module where the precision is float8-mixed only.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp
from torchao.float8.float8_linear import Float8Linear

from utils.errors import UserError

OLDEST_CAPABILITY = (8, 9)


class _Linear(Float8Linear):
    """Evaluates in bfloat16, with the weight that `_gather_in_bfloat16` has put beside it."""

    def train(self, mode: bool = True) -> _Linear:
        if isinstance(self.weight, DTensor):  # and not FSDP2's gathered one, which can stay from one pass to the next
            self._shard = (self.weight,)  # in a tuple, so that the module does not list the parameter twice
        return super().train(mode)

    def gather_in_bfloat16(self) -> None:
        (shard,) = self._shard
        local = shard.to_local()._tensor.bfloat16()
        whole = DTensor.from_local(
            local, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride()
        ).full_tensor()
        self.gathered = whole

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(input)
        return functional.linear(input, self.gathered, self.bias)


# Outside of what is compiled, as FSDP2's own hooks are.
@torch.compiler.disable
def _gather_in_bfloat16(block: torch.nn.Module, *_) -> None:
    if not block.training:
        for module in block.modules():
            if isinstance(module, _Linear):
                module.gather_in_bfloat16()


@torch.compiler.disable
def _drop_gathered(block: torch.nn.Module, *_) -> None:
    if not block.training:
        for module in block.modules():
            if isinstance(module, _Linear):
                del module.gathered


def convert_block(block: torch.nn.Module, device_type: str, compiled: bool) -> None:
    """Make a block's linear layers compute in float8; before it is sharded.

    Args:
        compiled: whether the block will be: uncompiled, each scaling is several passes over memory, and slower on a
            GPU than bfloat16.

    Raises:
        UserError: the GPU has no products in float8, or the block is not compiled for it.
    """
    on_gpu = device_type == "cuda"
    if on_gpu and not compiled:
        raise UserError("--precision=float8-mixed: slower than bf16-mixed without --parallel.compile=true. Set it.")
    if on_gpu and (capability := torch.cuda.get_device_capability()) < OLDEST_CAPABILITY:
        raise UserError(
            f"--precision=float8-mixed: {torch.cuda.get_device_name()} has compute capability "
            f"{capability[0]}.{capability[1]}; products in float8 need 8.9 or newer (Ada, Hopper, Blackwell). Use "
            "bf16-mixed."
        )
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=not on_gpu)
    convert_to_float8_training(block, config=config)
    for module in block.modules():
        if type(module) is Float8Linear:
            module.__class__ = _Linear
    block.register_forward_pre_hook(_gather_in_bfloat16)
    block.register_forward_hook(_drop_gathered)


update_scales = precompute_float8_dynamic_scale_for_fsdp
"""The scales of all weights of a model in one all-reduce, after they have changed; without, each gather needs one."""
