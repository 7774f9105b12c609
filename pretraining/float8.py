"""float8 for the blocks' linear layers: torchao's tensorwise recipe, with weights gathered in float8 under FSDP2.

Weights and optimizer stay in float32, and their names what they are; output layer, embedding and norms compute in
bfloat16. Inputs and weights of a linear layer are scaled to e4m3, gradients to e5m2, each tensor by its own largest
value (Micikevicius et al., arXiv:2209.05433), and multiplied in float8; on a CPU the same values are multiplied in
float32.

Evaluation is in bfloat16 altogether, as of weights that were never rounded to float8: bit for bit that of bf16-mixed.
FSDP2 knows one way to gather a weight, and keeps buffers of that type, so it gathers in float8 there too. Nobody reads
that: before a block evaluates, its weights are gathered once more, in bfloat16.

torchao is an extra: parallelism.py imports this module where the precision is float8-mixed only.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp
from torchao.float8.float8_linear import Float8Linear

from pretraining.checks import check_even_rows
from utils.errors import UserError

OLDEST_CAPABILITY = (8, 9)


class _Linear(Float8Linear):
    """Evaluates in bfloat16, for which `gather` comes before `forward`, and `drop` after it."""

    def train(self, mode: bool = True) -> _Linear:
        # Between forward and backward pass, and where FSDP2 does not reshard, it has put the gathered weight here.
        if isinstance(self.weight, DTensor):
            self._sharded = (self.weight,)  # in a tuple: the module must not list the parameter under a second name
        return super().train(mode)

    def gather(self) -> None:
        (weight,) = self._sharded
        local = weight.to_local()._tensor.bfloat16()
        mesh, placements = weight.device_mesh, weight.placements
        self._whole = DTensor.from_local(local, mesh, placements).full_tensor()

    def drop(self) -> None:
        del self._whole

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(input)
        return functional.linear(input, self._whole, self.bias)


def convert_block(block: torch.nn.Module, num_shards: int, device_type: str, compiled: bool) -> None:
    """Make a block's linear layers compute in float8; before it is sharded.

    Args:
        num_shards: processes that share a copy of the model.
        compiled: whether the block will be: uncompiled, each scaling is several passes over memory, and slower on a
            GPU than bfloat16.

    Raises:
        UserError: the GPU has no products in float8, the block is not compiled for it, or a weight cannot be shared out
            evenly.
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
    linears = [module for module in block.modules() if type(module) is Float8Linear]
    check_even_rows((linear.out_features for linear in linears), num_shards)
    for linear in linears:
        linear.__class__ = _Linear

    # Hooks run outside of what is compiled, as FSDP2's do.
    @torch.compiler.disable
    def gather(*_) -> None:
        if not block.training:
            for linear in linears:
                linear.gather()

    @torch.compiler.disable
    def drop(*_) -> None:
        if not block.training:
            for linear in linears:
                linear.drop()

    block.register_forward_pre_hook(gather)
    block.register_forward_hook(drop)


update_scales = precompute_float8_dynamic_scale_for_fsdp
"""The scales of all weights of a model in one all-reduce, after they have changed; without, each gather needs one."""
