"""The settings of distributed_pretrain.py, in litgpt's vocabulary where litgpt has a word for it.

Each field is a flag and a YAML key; its docstring is the help text, with unit and off value.

What shapes the trained model goes into the manifests of its checkpoints, and is compared when a run is resumed. Left
out are the fields marked PLACE, which say where and how to run, and those marked SOURCE, which name something that the
manifest states itself: the model's whole configuration, a hash of the data, the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PLACE = {"result": False}
SOURCE = {"result": False}

STOP_NAME = "stop"
"""A file of this name in out_dir ends the run early, with a checkpoint."""


@dataclass
class TrainSettings:
    """How long, in what batches, at what learning rate."""

    global_batch_size: int = 512
    """Sequences between two optimizer steps, over all processes. Accumulation follows from it, from
    train.micro_batch_size and from the number of processes."""
    micro_batch_size: int = 4
    """Sequences that one process computes at a time."""
    max_tokens: int | None = None
    """Tokens to train on (null: no limit). The run ends at the smallest of the given limits."""
    max_steps: int | None = None
    """Optimizer steps to run (null: no limit)."""
    epochs: float | None = None
    """Passes over the training data (null: no limit)."""
    max_time: float | None = field(default=None, metadata=PLACE)
    """Seconds after which this invocation saves a checkpoint and ends; the same command goes on (null: no limit)."""
    step_timeout: float | None = field(default=None, metadata=PLACE)
    """Seconds for which a process may stand still within a step before it counts as hung (null: 10 median steps, at
    least 60, at most 600)."""
    slow_timeout: float = field(default=3600.0, metadata=PLACE)
    """The same for what takes longer: start, first steps, the last save; and the most for other saves and validations,
    which may take 10 times as long as the longest before them."""
    max_seq_length: int | None = None
    """Tokens per sequence, the context (null: the model's block_size)."""
    document_masking: bool = False
    """A token attends to the tokens of its own document only (false: to all earlier tokens of its sequence)."""
    save_interval: int | None = 1000
    """Optimizer steps between checkpoints (null: only the final one)."""
    log_interval: int = 1
    """Optimizer steps between log records."""
    lr_schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of linear warm-up (null: see the next two, else 0)."""
    lr_warmup_tokens: int | None = None
    """Warm-up, in tokens (null: off)."""
    lr_warmup_fraction: float | None = None
    """Warm-up, as a fraction of all steps, 0 to 1 (null: off)."""
    lr_decay_fraction: float = 0.2
    """For wsd: the fraction of all steps, at the end, over which the rate falls."""
    min_lr: float = 4e-5
    """Learning rate at the end of the decay."""
    max_norm: float | None = 1.0
    """Gradients are scaled down to this global 2-norm (null: no clipping)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition function, which keeps logits small; 1e-4 is usual (0: off)."""
    router_aux_loss: float = 0.0
    """For mixtures of experts: weight of the load-balancing loss, which spreads tokens evenly over the experts of a
    layer; 0.01 is usual (0: it is only logged)."""
    tie_embeddings: bool = False
    """Whether the output layer shares the embedding's weights."""
    spike_sigma: float | None = None
    """A step whose loss or gradient norm is more than so many standard deviations above the mean of the last 128 good
    steps updates nothing; 6 is usual (null: off)."""
    max_spikes: int | None = None
    """Bad steps in a row (spikes, or not finite) after which the run goes back to the checkpoint before the first of
    them, and never reads what they read (null: it only skips them)."""
    max_nonfinite_steps: int = 10
    """Steps in a row with a loss or gradient norm that is not finite, after which the run stops. Such a step
    updates nothing."""


@dataclass
class DataSettings:
    """How the text on disk is watched."""

    verify: Literal["checksums", "sizes"] = "checksums"
    """checksums: each node reads every chunk once, in the background, and compares it with the dataset's manifest;
    sizes: only the sizes of the files are compared, at the start."""


@dataclass
class EvalSettings:
    """Validation, on the same blocks every time."""

    interval: int | None = 1000
    """Optimizer steps between validations (null: only those at start and end)."""
    max_iters: int = 100
    """Batches of train.global_batch_size sequences to validate on, as far as the data reaches."""
    initial_validation: bool = True
    """Whether to validate before the first step."""
    final_validation: bool = True
    """Whether to validate after the last step."""
    tasks: dict[str, str] | None = field(default=None, metadata=PLACE)
    """Tasks to answer at each validation: {NAME: DIRECTORY, ...}, made by tools.prepare_task (null: none)."""
    prompts: list[str] | None = field(default=None, metadata=PLACE)
    """Texts that the model continues at each validation, for samples.jsonl; needs tokenizer_dir (null: none)."""
    sample_tokens: int = field(default=64, metadata=PLACE)
    """Tokens that the model writes after each prompt, the likeliest one each time."""
    sample_temperature: float | None = field(default=None, metadata=PLACE)
    """It also writes tokens drawn at this temperature, the same draws at each validation; 0.8 is usual (null: no)."""


@dataclass
class LogSettings:
    """For wandb."""

    project: str | None = None
    """wandb project (null: 'pretrain')."""
    run: str | None = None
    """wandb run name (null: name of out_dir)."""
    group: str | None = None
    """wandb group (null: none)."""


@dataclass
class OptimizerSettings:
    """The optimizer; weights that are matrices decay, embeddings, norms and biases do not."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices inside blocks, AdamW for the rest."""
    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (0: off)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum."""


@dataclass
class ParallelSettings:
    """How the model is spread over processes, and what is recomputed or compiled."""

    sharding: Literal["full", "hybrid", "replicate"] = "full"
    """full: FSDP2 over all processes; hybrid: sharded within a node (or over shard_size processes) and replicated
    across nodes; replicate: every process holds the whole model (for small models)."""
    shard_size: int | None = None
    """For hybrid: processes that share one copy of the model; a multiple of a node's processes keeps the traffic
    between copies small (null: those of a node)."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a block after its forward pass and gather them again for the backward pass (false:
    more memory, less communication)."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients after every micro-batch instead of once per step: less memory (no unsharded gradients kept),
    more communication among the processes that share a copy. Copies are summed once per step in any case."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """The type in which gradients are summed, over processes and over micro-batches that were not reduced. bf16: half
    the traffic and half the memory of unsharded gradients, rounded to 8 bits at each addition."""
    context_parallel_size: int = field(default=1, metadata=PLACE)
    """Neighbouring processes of a node that share each sequence, for contexts too long for one GPU; each computes its
    part of the tokens, and for attention its part of the heads (1: each process has sequences of its own)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the rest; selective: keep attention and every second
    matrix product that the backward pass needs."""
    compile: bool = False
    """torch.compile each block."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits are held at once."""
    compare_copies_every: int | None = field(default=100, metadata=PLACE)
    """Steps after which copies of the model (hybrid, replicate) are compared, bit for bit (null: never)."""
    cpu_threads: int | None = None
    """Threads of a CPU process (null: cores of the machine divided by its processes)."""


@dataclass
class CheckpointSettings:
    """What is kept, and what happens when saving fails."""

    asynchronous: bool = True
    """Write in the background while training goes on."""
    keep_last: int | None = 3
    """Newest checkpoints to keep (null: all)."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this many steps are kept for good (null: none)."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How files are compared with their manifest before they are loaded."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full, no permission)."""


@dataclass
class Settings:
    """What is trained, on what data, where."""

    dataset_path: str | None = field(default=None, metadata=SOURCE)
    """Directory with train/ and val/, made by merge_files.py."""
    data_mixture: dict[str, float] | None = field(default=None, metadata=SOURCE)
    """Several such directories with their weights, instead of dataset_path: {DIRECTORY: WEIGHT, ...}."""
    out_dir: str = field(default="out/pretrain", metadata=PLACE)
    """Directory for checkpoints and metrics.jsonl, seen by every node."""
    model_name: str | None = field(default=None, metadata=SOURCE)
    """Name of a model that litgpt knows; 'list' prints all of them."""
    model_config: dict[str, Any] | None = field(default=None, metadata=SOURCE)
    """Your own sizes: keys of litgpt's Config, which replace those of model_name if both are given."""
    tokenizer_dir: str | None = field(default=None, metadata=SOURCE)
    """Tokenizer directory; checked against the dataset, and copied into every checkpoint."""
    initial_checkpoint_dir: str | None = None
    """Start from these weights: an exported or litgpt directory, or a checkpoint of this script."""
    num_nodes: int = field(default=1, metadata=PLACE)
    """Nodes of the Ray cluster to train on."""
    num_devices: int | None = field(default=None, metadata=PLACE)
    """Processes on each node (null: one per GPU; without GPUs, one CPU process)."""
    address: str | None = field(default=None, metadata=PLACE)
    """Ray cluster: HOST:PORT, 'auto', or 'local' to start one for this run (null: RAY_ADDRESS, or the cluster that runs
    on this machine, else one for this run)."""
    accelerator: Literal["auto", "cuda", "cpu"] = field(default="auto", metadata=PLACE)
    """auto: cuda where the cluster has GPUs."""
    precision: Literal["bf16-mixed", "float8-mixed", "bf16-true", "32-true"] | None = None
    """bf16-mixed: weights and optimizer in float32, computation in bfloat16; float8-mixed: the same, with the blocks'
    matrix products in float8 (null: bf16-mixed on cuda, 32-true on cpu)."""
    seed: int = 42
    """Decides initial weights and the order of the data."""
    max_failures: int = field(default=3, metadata=PLACE)
    """Failures in a row, without a new checkpoint between them, after each of which the training processes are started
    again: one died or hung (0: never, -1: always)."""
    check_hardware: Literal["auto", "always", "never"] = field(default="auto", metadata=PLACE)
    """Before training, check driver, compiler and disk of each node, and speed and results of each device, in a few
    seconds (auto: on GPUs)."""
    logger_name: Literal["csv", "tensorboard", "wandb"] = field(default="csv", metadata=PLACE)
    """Where metrics go besides metrics.jsonl."""
    dry_run: bool = field(default=False, metadata=PLACE)
    """Check everything, print the plan, and stop."""
    tokens: float | None = field(default=None, metadata=PLACE)
    """With dry_run: plan for a dataset of this many tokens, 10e9 for example, without reading one, nor a tokenizer
    (null: dataset_path is read)."""
    profile_steps: int = field(default=0, metadata=PLACE)
    """Write a trace of this many steps, from the third on, to out_dir/profile (0: off)."""
    profile_memory: bool = field(default=False, metadata=PLACE)
    """With profile_steps: every allocation in the trace, and on a GPU a snapshot of its memory beside it."""
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings, metadata=PLACE)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings, metadata=PLACE)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings, metadata=PLACE)

    def checks_hardware(self) -> bool:
        """Whether nodes and devices are checked before training; the accelerator is settled."""
        return self.check_hardware == "always" or (self.check_hardware == "auto" and self.accelerator == "cuda")
