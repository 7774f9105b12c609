"""The loss and its gradients are those of the full logits, whatever the chunks, and cost one chunk's logits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pretrain_ranks import free_port
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from pretraining.loss import IGNORED_TARGET, OutputLayer, next_token_loss

OPTIONS = [{}, {"z_loss": 0.01}, {"softcap": 5.0}, {"z_loss": 0.01, "softcap": 5.0}]


def make_inputs(num_tokens=50, width=16, vocabulary=301, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / 4).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocabulary, (num_tokens,), generator=generator)


def plain_loss(hidden, weight, bias, targets, z_loss=0.0, softcap=None):
    """The definition, from all logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    return entropy, entropy + z_loss * logits.logsumexp(1).square().sum()


def loss_and_gradients(function, inputs, incoming=1.0, dtype=None, **options):
    tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs[:3]]
    entropy, objective = function(*tensors, inputs[3], **options)
    (objective * incoming).backward()
    return [entropy.detach(), objective.detach(), *(t.grad for t in tensors)]


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 8, 25, 64])
def test_in_float32_it_is_the_definition_in_float64(options, chunk_tokens):
    inputs = make_inputs()
    exact = loss_and_gradients(plain_loss, inputs, 0.3, torch.float64, **options)
    for value, expected in zip(
        loss_and_gradients(next_token_loss, inputs, 0.3, chunk_tokens=chunk_tokens, **options), exact, strict=True
    ):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_that_are_ignored_count_for_nothing(options):
    """As if they were not there; chunks of 8, so that one holds both kinds and one only ignored rows."""
    inputs = make_inputs()
    kept = torch.arange(50) % 7 != 3
    kept[16:24] = False
    some = [inputs[0].detach()[kept].requires_grad_(), *inputs[1:3], inputs[3][kept]]
    expected = loss_and_gradients(next_token_loss, some, 0.3, chunk_tokens=8, **options)
    targets = inputs[3].masked_fill(~kept, IGNORED_TARGET)
    found = loss_and_gradients(next_token_loss, [*inputs[:3], targets], 0.3, chunk_tokens=8, **options)
    assert not found[2][~kept].any()
    found[2] = found[2][kept]
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < 1e-6


def test_a_large_vocabulary_is_as_exact():
    inputs = make_inputs(num_tokens=256, width=64, vocabulary=32000)
    exact = loss_and_gradients(plain_loss, inputs, 1 / 256, torch.float64)
    ours = loss_and_gradients(next_token_loss, inputs, 1 / 256, chunk_tokens=32)
    assert all(relative_error(*pair) < 1e-6 for pair in zip(ours, exact, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_in_bfloat16_it_is_no_worse_than_the_full_logits(options):
    """Many chunks, because a sum in bfloat16 would lose digits with each of them."""
    inputs = make_inputs(num_tokens=512, width=32, vocabulary=1000, dtype=torch.bfloat16)
    exact = loss_and_gradients(plain_loss, inputs, 1 / 300, torch.float64, **options)
    full = loss_and_gradients(plain_loss, inputs, 1 / 300, **options)
    ours = loss_and_gradients(next_token_loss, inputs, 1 / 300, chunk_tokens=8, **options)
    assert [value.dtype for value in ours] == [torch.float32] * 2 + [torch.bfloat16] * 3
    for value, unchunked, expected in zip(ours, full, exact, strict=True):
        # 2^-9 is the error of rounding once to bfloat16.
        assert relative_error(value, expected) <= max(relative_error(unchunked, expected), 1e-6)
        assert relative_error(value, expected) < 2**-9


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_tensor_that_wants_no_gradient_gets_none(frozen):
    inputs = make_inputs()
    inputs[frozen].requires_grad_(False)
    _, objective = next_token_loss(*inputs, chunk_tokens=8)
    objective.backward()
    assert [tensor.grad is None for tensor in inputs[:3]] == [i == frozen for i in range(3)]


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


def test_three_products_per_chunk_and_one_without_gradients():
    inputs = make_inputs()
    with CountProducts() as training:
        _, objective = next_token_loss(*inputs, chunk_tokens=25)
        objective.backward()
    with CountProducts() as validation, torch.no_grad():
        entropy, _ = next_token_loss(*inputs, chunk_tokens=25)
    assert (training.count, validation.count) == (6, 2)
    assert torch.equal(entropy, next_token_loss(*inputs, chunk_tokens=25)[0])


def test_a_second_backward_pass_is_refused():
    _, objective = next_token_loss(*make_inputs(), chunk_tokens=25)
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.backward()


def test_what_a_gpu_would_multiply_is_bfloat16_added_up_in_float32():
    """Fake tensors: nothing is computed, types and shapes are."""
    seen = set()

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.add((*(t.dtype for t in args if isinstance(t, torch.Tensor)), out.dtype))
            return out

    with FakeTensorMode(), Types():
        hidden = torch.empty(40, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(301, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        targets = torch.empty(40, dtype=torch.int64, device="cuda")
        next_token_loss(hidden, weight, None, targets, chunk_tokens=16)
    narrow, wide = torch.bfloat16, torch.float32
    assert seen == {(narrow, narrow, wide), (wide, narrow, narrow, wide)}


def test_the_output_layer_is_a_linear_layer_without_targets():
    hidden, _, _, targets = make_inputs()
    layer = OutputLayer(16, 301)
    assert torch.equal(layer(hidden), F.linear(hidden, layer.weight, layer.bias))
    for value, expected in zip(
        layer(hidden, targets, chunk_tokens=8, z_loss=0.01),
        plain_loss(hidden, layer.weight, layer.bias, targets, z_loss=0.01),
        strict=True,
    ):
        torch.testing.assert_close(value, expected)


class TinyModel(torch.nn.Module):
    """An embedding, a compiled block and the output layer; the loss is the output layer's forward pass."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = torch.nn.Embedding(301, 16)
        self.block = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.GELU())
        self.lm_head = OutputLayer(16, 301, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, tokens):
        hidden = self.block(self.embedding(tokens[:-1]))
        return self.lm_head(hidden, tokens[1:], chunk_tokens=16, z_loss=1e-3)


def tokens_of(rank: int, micro_step: int) -> torch.Tensor:
    return torch.randint(301, (65,), generator=torch.Generator().manual_seed(10 * rank + micro_step))


def check_gradients_of_two_processes(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for tied, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        check_gradients(rank, tied, dtype)
    dist.destroy_process_group()


def check_gradients(rank: int, tied: bool, dtype: torch.dtype) -> None:
    """Two micro-batches per process, reduced once. What is expected is computed here, without FSDP2."""
    expected, entropies = {}, {}
    for other, micro_step in itertools.product(range(2), range(2)):
        plain = TinyModel(tied).to(dtype)
        entropies[other, micro_step], objective = plain(tokens_of(other, micro_step))
        (objective / 64).backward()
        for name, parameter in plain.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad.float() / 2

    model = TinyModel(tied)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.block.compile(backend="aot_eager")
    fully_shard(model.block, mp_policy=policy)
    if not tied:
        fully_shard(model.lm_head, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    for micro_step in range(2):
        model.set_requires_gradient_sync(micro_step == 1)
        entropy, objective = model(tokens_of(rank, micro_step))
        assert torch.equal(entropy, entropies[rank, micro_step])
        (objective / 64).backward()
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        message = f"{name}, tied: {tied}, {dtype}"
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-6, atol=1e-7, msg=message)
    with torch.no_grad():
        assert torch.equal(model(tokens_of(rank, 0))[0], entropies[rank, 0])


def test_sharded_by_itself_it_gives_the_gradients_of_the_unsharded_layer():
    torch.multiprocessing.spawn(check_gradients_of_two_processes, (free_port(),), nprocs=2)
