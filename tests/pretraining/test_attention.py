"""Our model is litgpt's, variant by variant of attention; documents and windows hide exactly what they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from litgpt.config import Config, configs
from litgpt.model import GPT, Block, do_softcapping
from pretrain_ranks import free_port
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretraining.attention import (
    Band,
    Causal,
    Flex,
    Masked,
    Varlen,
    _first_keys,
    _flex_blocks,
    attention_patterns,
    fastest_kernels,
)
from pretraining.documents import Separator, document_offsets
from pretraining.model import PretrainGPT
from pretraining.parallelism import checkpoint_activations
from pretraining.settings import Settings

TOKENS, VOCABULARY = 40, 96
HALF = {"dtype": torch.bfloat16, "device": "cuda"}


def heads_of(config: Config) -> int:
    """Key and value heads for four query heads: as many, one, or two."""
    return {config.n_head: 4, 1: 1}.get(config.n_query_groups, 2)


def shrink(config: Config, **changes) -> Config:
    """The same attention, with two layers (of two kinds where the original has two) of four heads."""
    fields = {
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
        **{"n_layer": 2, "n_embd": 64 if config.head_size * config.n_head == config.n_embd else 48, "n_head": 4},
        **{"head_size": 16, "n_query_groups": heads_of(config), "intermediate_size": 32, "block_size": 2 * TOKENS},
        **{"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "n_expert": min(config.n_expert, 4)},
    }
    if config.sliding_window_size is not None:
        fields |= {"sliding_window_size": 7, "sliding_window_indices": two_kinds(config.sliding_window_indices)}
    if config.rope_indices is not None:
        fields["rope_indices"] = two_kinds(config.rope_indices)
    return Config(**{**fields, **changes})


def two_kinds(indices: list[int]) -> list[int]:
    return sorted(set(indices), reverse=True) if len(set(indices)) == 2 else indices[:2]


def variants() -> dict[str, Config]:
    """One configuration of litgpt for each attention that differs from all others."""
    found = {}
    for fields in configs:
        config = Config(**fields)
        shrunk = shrink(config)
        key = [shrunk.n_query_groups, shrunk.n_embd, shrunk.sliding_window_indices, shrunk.rope_indices]
        key += [config.rotary_percentage, config.norm_qk and config.norm_qk_type, config.attention_logit_softcapping]
        key += [config.attention_scores_scalar is None, config.rope_local_base_freq, config.rope_interleave]
        key += [sorted(config.rope_adjustments or {}), config.bias, config.attn_bias, config.parallel_residual]
        key += [config.norm_class_name, bool(config.latent_attention)]
        found.setdefault(str(key), config)
    return {config.name: config for config in found.values()}


VARIANTS = variants()
WINDOWED = ["Gemma-2-2b", "Gemma-3-4b-it", "Mistral-7B-v0.1"]


def make_model(config: Config) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def our_model(theirs: GPT) -> PretrainGPT:
    ours = PretrainGPT(theirs.config, Settings())
    ours.load_state_dict(theirs.state_dict())
    return ours


def logits_of(model: PretrainGPT, inputs: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    logits = model.lm_head(model.hidden_states(inputs, offsets))
    cap = model.config.final_logit_softcapping
    return logits if cap is None else do_softcapping(logits, cap)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def make_tokens(rows: int = 2, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))


def assert_equal_models(theirs: GPT, tokens: torch.Tensor) -> None:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    ours = our_model(theirs)
    expected = token_losses(theirs(inputs), targets)
    losses = token_losses(logits_of(ours, inputs), targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    expected.mean().backward()
    losses.mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_litgpts(name):
    assert_equal_models(make_model(shrink(VARIANTS[name])), make_tokens())


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(("window", "kind"), [(1, Band), (4, Band), (26, Band), (27, Masked), (39, Masked)])
def test_a_window_of_any_size_is_litgpts(name, window, kind):
    config = shrink(Config.from_name(name), sliding_window_size=window)
    assert type(attention_patterns(config, torch.zeros(1, TOKENS, 1))[0]) is kind
    assert_equal_models(make_model(config), make_tokens())


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_over_the_whole_sequence_costs_nothing(name):
    config = shrink(Config.from_name(name), sliding_window_size=TOKENS)
    capped = config.attention_logit_softcapping is not None
    assert {type(p) for p in attention_patterns(config, torch.zeros(1, TOKENS, 1))} == {Masked if capped else Causal}
    assert_equal_models(make_model(config), make_tokens())


@pytest.mark.parametrize("feature", ["yarn", "interleaved"])
def test_what_no_configuration_has_but_a_user_may_ask_for(feature):
    yarn = {
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_seq_len": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    change = {"rope_adjustments": yarn} if feature == "yarn" else {"rope_interleave": True}
    assert_equal_models(make_model(shrink(Config.from_name("Llama-3.1-8B"), **change)), make_tokens())


def test_latent_attention_is_left_to_litgpt():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    config = shrink(Config.from_name("open_llama_3b"), latent_attention=latent)
    assert_equal_models(make_model(config), make_tokens())
    with pytest.raises(ValueError, match="latent"):
        attention_patterns(config, torch.zeros(1, 4, 1), torch.tensor([0, 4]))


# --- documents --------------------------------------------------------------------------------------------------------


BOS = Separator(0, begins=True)


def offsets_of(inputs: torch.Tensor, separator: Separator = BOS) -> torch.Tensor:
    return torch.from_numpy(document_offsets(inputs.numpy(), [separator] * len(inputs)))


def packed(lengths=((9, 1, 30), (40,), (17, 23))) -> torch.Tensor:
    """Rows of documents that each begin with BOS, which is token 0."""
    tokens = make_tokens(len(lengths))
    for row, documents in zip(tokens, lengths, strict=True):
        begins = torch.tensor([0, *documents]).cumsum(0)
        row[begins] = 0
    return tokens


def losses_of_documents(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    return token_losses(logits_of(model, tokens[:, :-1], offsets_of(tokens[:, :-1])), tokens[:, 1:])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_document_has_the_loss_and_gradients_that_it_has_alone(name):
    lengths = ((9, 1, 30), (40,), (17, 23))
    theirs = make_model(shrink(VARIANTS[name]))
    ours = our_model(theirs)
    tokens = packed(lengths)
    losses = losses_of_documents(ours, tokens)
    losses.sum().div(100).backward()
    for row, documents in enumerate(lengths):
        begin = 0
        for length in documents:
            alone = tokens[row : row + 1, begin : begin + length + 1]
            expected = token_losses(theirs(alone[:, :-1]), alone[:, 1:])
            torch.testing.assert_close(losses[row : row + 1, begin : begin + length], expected, rtol=1e-5, atol=2e-5)
            expected.sum().div(100).backward()
            begin += length
    for (name, parameter), other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other[1].grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "falcon-7b", "OLMo-2-1124-7B", *WINDOWED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_changes_no_others_loss_by_a_bit(name, dtype):
    model = our_model(make_model(shrink(Config.from_name(name)))).to(dtype)
    tokens = packed()
    changed = tokens.clone()
    changed[0, 2:9] = 50  # the first document of the first row, without its BOS
    changed[2, 20:40] = 51  # the second of the third row
    before, after = losses_of_documents(model, tokens), losses_of_documents(model, changed)
    same = torch.ones(3, TOKENS, dtype=torch.bool)
    same[0, 1:9], same[2, 19:40] = False, False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before, after)


# --- what runs --------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.append((function, args, kwargs or {}, out))
        return out


def test_keys_and_values_keep_their_groups():
    model = our_model(make_model(shrink(Config.from_name("Llama-3.1-8B"))))
    with Operations() as operations:
        logits_of(model, make_tokens()[:, :-1])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    heads = [[t.size(1) for t in args[:3]] for function, args, _, _ in operations.seen if function is kernel]
    assert heads == [[4, 2, 2]] * 2


@pytest.mark.parametrize("documents", [False, True])
def test_a_band_holds_no_scores_of_the_whole_sequence(documents):
    model = our_model(make_model(shrink(Config.from_name("Mistral-7B-v0.1"), block_size=1024)))
    tokens = make_tokens(rows=1, tokens=1024)
    offsets = offsets_of(tokens[:, :-1], Separator(5, begins=False)) if documents else None
    with Operations() as operations:
        logits_of(model, tokens[:, :-1], offsets).sum().backward()
    largest = max(out.numel() for _, _, _, out in operations.seen if isinstance(out, torch.Tensor))
    assert largest < 1024 * 1024 / 4


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bands_blocks_share_one_mask_and_read_keys_where_they_lie(rows):
    config = shrink(Config.from_name("Gemma-3-4b-it"), sliding_window_size=64, sliding_window_indices=[1, 1])
    short, long = (attention_patterns(config, torch.zeros(rows, tokens, 1))[0] for tokens in (128, 1024))
    assert torch.equal(short.mask, long.mask) and short.mask.shape == (1, 1, 8, 72)
    k = torch.randn(rows, 2, 1024, 16)
    with Operations() as operations:
        long.attend(torch.randn(rows, 4, 1024, 16), k, k, 0.25, None)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    keys = [args[1] for function, args, _, _ in operations.seen if function is kernel]
    assert [part.shape[2] for part in keys] == [64, 72]
    assert all(part.untyped_storage().nbytes() == k.nbytes for part in keys)


def test_layers_share_their_masks():
    config = shrink(
        Config.from_name("Gemma-3-4b-it"), n_layer=4, sliding_window_indices=[1, 0] * 2, rope_indices=[1, 0] * 2
    )
    patterns = attention_patterns(config, torch.zeros(2, TOKENS, 1), torch.tensor([0, 30, 80], dtype=torch.int32))
    assert patterns[0] is patterns[2] and patterns[1] is patterns[3]
    assert [type(pattern) for pattern in patterns[:2]] == [Band, Masked]


@pytest.mark.parametrize("name", ["Llama-3.1-8B", *WINDOWED])
@pytest.mark.parametrize("documents", [False, True])
def test_a_compiled_block_is_one_graph_for_all_batches(name, documents):
    model = our_model(make_model(shrink(Config.from_name(name))))
    tokens = packed()
    plain = losses_of_documents(model, tokens)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, backend=count, fullgraph=True)
    for batch in (tokens, tokens.flip(0), packed(((20, 20), (5, 35), (39, 1)))):
        offsets = offsets_of(batch[:, :-1]) if documents else None
        logits = logits_of(model, batch[:, :-1], offsets)
        if documents and batch is tokens:
            torch.testing.assert_close(token_losses(logits, tokens[:, 1:]), plain)
    # Layers of one kind share a graph.
    assert len(graphs) == len(set(model.config.sliding_window_indices or [0]))


def check_sharded_models(rank: int, port: int) -> None:
    """Each process has its own row; the mean of the gradients is what the unsharded model has for both rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, how, compiled in [("Gemma-2-2b", "selective", False), ("Gemma-3-4b-it", "full", True)]:
        plain = our_model(make_model(shrink(Config.from_name(name))))
        tokens = packed(((9, 1, 30), (17, 23)))
        expected = losses_of_documents(plain, tokens)
        expected.sum().div(100).backward()
        sharded = our_model(make_model(shrink(Config.from_name(name))))
        for block in sharded.transformer.h:
            if how != "none":
                checkpoint_activations(block, how)
            if compiled:
                block.compile(backend="aot_eager")
            fully_shard(block)
        losses = losses_of_documents(sharded, tokens[rank : rank + 1])
        torch.testing.assert_close(losses[0], expected[rank], rtol=1e-5, atol=1e-5)
        losses.sum().div(50).backward()
        for (key, parameter), other in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            if key.startswith("transformer.h."):
                message = f"{name} {how} {compiled} {key}"
                gradient = parameter.grad.full_tensor()
                torch.testing.assert_close(gradient, other.grad, rtol=1e-5, atol=1e-5, msg=message)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_recomputed_and_compiled_blocks_give_the_same():
    torch.multiprocessing.spawn(check_sharded_models, (free_port(),), nprocs=2)


def count_calls(operations: Operations, function) -> int:
    return sum(seen is function for seen, *_ in operations.seen)


@pytest.mark.parametrize(("how", "calls"), [("selective", 2), ("full", 4)])
def test_selective_recomputation_keeps_what_attention_computed(how, calls):
    model = our_model(make_model(shrink(Config.from_name("Llama-3.1-8B"))))
    for block in model.transformer.h:
        checkpoint_activations(block, how)
    with Operations() as operations:
        logits_of(model, make_tokens()[:, :-1]).sum().backward()
    assert count_calls(operations, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default) == calls


# --- the GPU's kernels, as far as a CPU can show ----------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["window", "global"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_gpu_runs_fused_kernels_without_a_mask(layer, documents):
    """Fake tensors: nothing is computed, but operations, shapes and types are those of a GPU."""
    config = shrink(Config.from_name("Gemma-3-4b-it"), sliding_window_indices=[int(layer == "window")] * 2)
    with FakeTensorMode(), Operations() as operations:
        x, q = torch.empty(2, TOKENS, 64, **HALF), torch.empty(2, 4, TOKENS, 16, **HALF)
        k, v = torch.empty(2, 2, TOKENS, 16, **HALF), torch.empty(2, 2, TOKENS, 16, **HALF)
        offsets = torch.empty(9, dtype=torch.int32, device="cuda") if documents else None
        pattern = attention_patterns(config, x, offsets)[0]
        y = pattern.attend(q, k, v, 0.25, None)
    assert (y.shape, y.dtype, y.device) == (q.shape, q.dtype, q.device)
    if layer == "global" and not documents:
        assert type(pattern) is Causal
        return
    ((q, k, v, offsets, _, longest, _, causal, scale, window, grouped),) = (
        args[:11] for function, args, _, _ in operations.seen if function is torch.ops.torch_attn._varlen_attn.default
    )
    assert (q.shape, k.shape, v.shape) == ((2 * TOKENS, 4, 16), (2 * TOKENS, 2, 16), (2 * TOKENS, 2, 16))
    assert (offsets.dtype, len(offsets), longest, scale, grouped) == (
        torch.int32,
        9 if documents else 3,
        TOKENS,
        0.25,
        True,
    )
    # FlashAttention's left side leaves out the query's own token, which litgpt's window counts.
    assert (causal, window) == ((False, [6, 0]) if layer == "window" else (True, [-1, 0]))


def block_and_arguments() -> tuple[Block, tuple]:
    """With documents masked as on a GPU. Fake tensors of the CPU, for those of a GPU have no backward pass here."""
    block = PretrainGPT(shrink(Config.from_name("Llama-3.1-8B"), n_layer=1), Settings()).transformer.h[0]
    x, cos = torch.empty(2, TOKENS, block.config.n_embd, requires_grad=True), torch.empty(1, TOKENS, 16)
    return block, (x, cos, cos, Varlen(torch.empty(9, dtype=torch.int32), None))


def test_a_compiled_block_is_one_graph_on_a_gpu_too():
    graphs = []

    def count(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if "varlen_attn" in str(node.target)])
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        block, arguments = block_and_arguments()
        block.forward = torch.compile(block.forward, backend=count, fullgraph=True)
        for _ in range(3):
            block(*arguments[:-1], Varlen(torch.empty(9, dtype=torch.int32), None)).sum().backward()
    assert [len(kernels) for kernels in graphs] == [1]


@pytest.mark.parametrize(("how", "calls"), [("selective", 1), ("full", 2)])
def test_selective_recomputation_keeps_what_a_gpus_kernel_computed(how, calls):
    with FakeTensorMode(), Operations() as operations:
        block, arguments = block_and_arguments()
        checkpoint_activations(block, how)
        block(*arguments).sum().backward()
    assert count_calls(operations, torch.ops.torch_attn._varlen_attn.default) == calls


class AttentionCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heads = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.heads.append([part.size(1) for part in args[:3]])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, [4, 2, 2]), (torch.float32, [4, 4, 4])], ids=str)
def test_a_gpu_repeats_keys_only_for_the_kernel_that_has_no_groups(dtype, heads):
    """Efficient attention, the one that takes float32."""
    with FakeTensorMode(), AttentionCalls() as calls:
        q, k = (torch.empty(1, n, TOKENS, 16, dtype=dtype, device="cuda") for n in (4, 2))
        Causal().attend(q, k, k, 0.25, None)
    assert calls.heads == [heads]


def test_cudnn_comes_first_on_a_gpu_for_as_long_as_the_run_lasts():
    torchs_own = torch._C._get_sdp_priority_order()
    with fastest_kernels(torch.device("cuda")):
        first, second, *_ = torch._C._get_sdp_priority_order()
        enabled = torch.backends.cuda.math_sdp_enabled()
    assert (first, second) == (SDPBackend.CUDNN_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value) and enabled
    assert torch._C._get_sdp_priority_order() == torchs_own
    with fastest_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == torchs_own


@pytest.mark.parametrize("documents", [False, True])
def test_a_gpu_caps_scores_in_flex_attention(documents):
    with FakeTensorMode():
        offsets = torch.empty(9, dtype=torch.int32, device="cuda") if documents else None
        x = torch.empty(2, TOKENS, 64, **HALF)
        patterns = attention_patterns(shrink(Config.from_name("Gemma-2-2b")), x, offsets)
    assert [type(pattern) for pattern in patterns] == [Flex, Flex]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_attention_gives_what_the_cpu_gives(window, documents):
    """FlexAttention has no backward pass on a CPU; its forward pass, compiled into one graph, is exercised here."""
    config = shrink(Config.from_name("Gemma-2-2b"), sliding_window_indices=[int(window is not None)] * 2)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, TOKENS, 16) * 9, torch.randn(2, 2, TOKENS, 16) * 9, torch.randn(2, 2, TOKENS, 16)
    offsets = torch.tensor([0, 5, 12, 40, 73, 80, 80], dtype=torch.int32) if documents else None
    (expected, _) = attention_patterns(config, torch.zeros(2, TOKENS, 64), offsets)
    flex = Flex(_flex_blocks(_first_keys(2, TOKENS, offsets, window, q.device).expand(2, -1).contiguous()))
    attend = torch.compile(Flex.attend, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(attend(flex, q, k, v, 0.25, 50.0), expected.attend(q, k, v, 0.25, 50.0))
