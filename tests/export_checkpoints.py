"""Checkpoints for the tests of exporting: sharded by two real processes, as distributed_pretrain.py shards them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from utils.manifest import file_entry, write_manifest

TINY = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "intermediate_size": 96,
    "vocab_size": 1024,
    "padded_vocab_size": 1024,
    "block_size": 64,
}


def write_sharded_checkpoint(directory: Path, model: str, sizes: dict[str, Any]) -> None:
    """Train a model two steps with AdamW on two processes and save it as Lightning Fabric does.

    Args:
        model: a name that litgpt knows.
        sizes: changes to its configuration.
    """
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, directory, model, sizes), nprocs=2)


def _train(rank: int, port: int, directory: Path, name: str, sizes: dict[str, Any]) -> None:
    import lightning
    import torch
    from lightning.fabric.strategies import ModelParallelStrategy
    from litgpt import GPT, Config
    from litgpt.utils import save_config
    from torch.distributed.fsdp import fully_shard

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="export",
    )  # fmt: skip
    torch.set_num_threads(1)

    def shard(model, mesh):
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = Config.from_name(name, **sizes)
    model = GPT(config)
    for parameter in model.parameters():  # norms too: a norm of ones would hide that it is not applied
        torch.nn.init.normal_(parameter, std=0.15)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(2):
        tokens = torch.randint(0, config.vocab_size, (2, 17))
        logits = model(tokens[:, :-1])
        fabric.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(directory / "lit_model.pth", {"model": model, "optimizer": optimizer, "step": 2})
    if fabric.global_rank == 0:
        save_config(config, directory)


def write_random_weights(directory: Path, model: str, sizes: dict[str, Any]) -> None:
    """lit_model.pth and model_config.yaml of a small model whose weights, norms too, are random.

    Args:
        model: a name that litgpt knows.
        sizes: changes to its configuration, beyond `TINY` with a context of 512.
    """
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    config = Config.from_name(model, **{**TINY, "block_size": 512, **sizes})
    torch.manual_seed(0)
    weights = GPT(config)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    torch.save(weights.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)


def write_checkpoint_manifest(directory: Path) -> None:
    """A manifest as training writes it, over datasets that came from one parquet file."""
    datasets = [
        {
            "path": f"data/{split}",
            "sha256": "0" * 64,
            "manifest": {
                "schema_version": 1,
                "kind": "dataset",
                "made_by": {"script": "merge_files.py", "versions": {"litdata": "0.2.76"}},
                "split": split,
                "settings": {},
                "content": {"documents": documents, "tokens": 100 * documents, "text_bytes": 400 * documents},
                "inputs": [{"path": "fineweb/000_00000.parquet", "bytes": 12345, "rows": 100, "fingerprint": "0"}],
            },
        }
        for split, documents in (("train", 90), ("val", 10))
    ]
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    write_manifest(
        directory,
        {
            "kind": "checkpoint",
            "made_by": {"script": "distributed_pretrain.py", "versions": {"torch": "2.14.1"}},
            "settings": {
                "context_tokens": 64,
                "precision": "32-true",
                "seed": 0,
                "train": {"global_batch_size": 8},
                "optimizer": {"name": "AdamW", "lr": 0.01},
            },
            "tokenizer": None,
            "content": {"step": 100, "tokens": 6400, "val_loss": 3.25, "val_bits_per_byte": 1.5},
            "files": [file_entry(directory, name) for name in names],
            "inputs": datasets,
        },
    )
