"""What an unknown flag or value may have meant: it has a typing error, or is another project's name for one of ours."""

import difflib

SHARDING = "train_fsdp.py shards the model over all ranks"
# Names of our flags in other projects (nanoGPT, nanochat, the Hugging Face Trainer), for "did you mean"; or, with a
# space, what to do where no flag is like it.
ELSEWHERE = {"learning_rate": "lr", "max_iters": "num_steps", "max_steps": "num_steps", "block_size": "seq_len",
             "output_dir": "checkpoint_path", "out_dir": "checkpoint_path", "bf16": "amp_dtype", "fp16": "amp_dtype",
             "bfloat16": "bf16", "float16": "fp16", "constant": "none", "optim": "optimizer",
             "torch_compile": "compile", "save_total_limit": "keep_last", "unembedding_lr": "lr",
             "overwrite_output_dir": "overwrite", "per_device_eval_batch_size": "batch_size",
             "max_seq_length": "seq_len", "model_name_or_path": "init_from", "evaluation_strategy": "eval_steps",
             "eval_strategy": "eval_steps", "constant_with_warmup": "none",
             "resume_from_checkpoint": "resume", "hidden_size": "d_model", "n_embd": "d_model", "dtype": "amp_dtype",
             "gradient_accumulation_steps": "grad_accum_steps", "wandb_log": "use_wandb",
             "max_grad_norm": "grad_clip_norm", "grad_clip": "grad_clip_norm", "log_interval": "log_steps",
             "eval_interval": "eval_steps", "dataset": "train_data", "tokenizer": "tokenizer_name",
             "data": "train_data", "epochs": "num_epochs", "batch": "batch_size", "context_length": "seq_len",
             "max_seq_len": "seq_len", "sequence_length": "seq_len", "ckpt": "checkpoint_path", "wandb": "use_wandb",
             "model": "arch", "model_name": "init_from", "save_interval": "save_steps", "steps": "num_steps",
             "always_save_checkpoint": "save_steps", "per_device_train_batch_size": "batch_size",
             "micro_batch_size": "batch_size", "start": "prompt", "gpu": "cuda", "precision": "amp_dtype",
             "gradient_checkpointing": "use_activation_checkpoint", "vocab": "vocab_size",
             "num_train_epochs": "num_epochs", "num_iterations": "num_steps",
             "tokens": "num_tokens", "train_tokens": "num_tokens", "total_tokens": "num_tokens",
             "param_data_ratio": "num_tokens", "target_param_data_ratio": "num_tokens", "eval_iters": "eval_tokens",
             "depth": "n_layers", "device_batch_size": "batch_size", "total_batch_size": "global_batch_tokens",
             "matrix_lr": "muon_lr", "embedding_lr": "lr", "report_to": "use_wandb", "enable_wandb": "use_wandb",
             "run_name": "wandb_run_name", "run": "wandb_run_name", "save_every": "save_steps",
             "checkpoint_every": "save_steps", "sample_every": "sample_steps", "eval_every": "eval_steps",
             "logging_steps": "log_steps", "log_every": "log_steps", "val_interval": "eval_steps",
             "validation_data": "val_data", "val_split": "val_ratio", "val_size": "val_ratio", "resume_from": "resume",
             "resume_from_step": "resume", "adam_beta1": "beta1", "adam_beta2": "beta2", "wd": "weight_decay",
             "load_optimizer": "keep_optimizer", "load_optimizer_state": "keep_optimizer",
             # The schedule.
             "warmup": "warmup_steps", "warmup_iters": "warmup_steps", "warmup_ratio": "warmup_steps",
             "lr_scheduler_type": "lr_scheduler", "decay_lr": "lr_scheduler", "lr_decay_iters": "num_steps",
             "final_lr": "min_lr", "final_lr_frac": "min_lr", "decay_ratio": "decay_steps", "decay": "decay_steps",
             "lr_decay_steps": "decay_steps", "decay_iters": "decay_steps", "warmdown": "decay_steps",
             "warmdown_ratio": "decay_steps", "warmdown_steps": "decay_steps", "warmdown_iters": "decay_steps",
             "cooldown": "decay_steps", "cooldown_steps": "decay_steps", "cooldown_ratio": "decay_steps",
             # torchtitan's and torchtune's tables, Flyte's words.
             "metrics": "wandb", "metric_logger": "wandb", "run_mode": "wandb_run_mode", "project": "wandb_project",
             "rank_scope": "wandb_rank_scope",
             **dict.fromkeys(("use_tensor_parallel", "tensor_parallel", "tp", "fsdp", "use_fsdp"), SHARDING),
             "download_logs": "after the run: python wandb_tools.py download RUN.pt",
             "eval_only": "run python evaluate.py", "bias": "it comes with --arch",
             "z_loss": "docs/extending.md has it as a diff", "ema": "docs/extending.md has it as a diff",
             "mlp_ratio": "the MLP's width is --d-ff",
             "early_stop": "the best weights are kept in .best.pt", "patience": "the best weights are kept in .best.pt",
             "early_stopping": "the best weights are kept in .best.pt"}


def plain(name):
    """--batch-size → batch_size"""
    return name.lstrip("-").replace("-", "_")


def nearest(word, known):
    """"; did you mean …?" with the one of `known` that `word` may have meant; "" if there is none."""
    names, meant = {plain(name): name for name in known}, ELSEWHERE.get(plain(word), "")
    # Typing errors score above 0.8, words of another meaning below.
    close = [meant] if meant in names else difflib.get_close_matches(plain(word), names, n=1, cutoff=0.8)
    return f"; did you mean {names[close[0]]}?" if close else ""


def advice(word, known):
    """The same of a flag, or what to do instead."""
    meant = ELSEWHERE.get(plain(word), "")
    return f"; {meant}" if " " in meant else nearest(word, known)
