"""What an unknown flag or value may have meant: it has a typing error, or is another project's name for one of ours."""

import difflib

# Our flags, values and TOML tables → their names in other projects, such as nanoGPT, nanochat, torchtitan and the
# Hugging Face Trainer. With a space: what to say where no flag is like it.
OTHER_NAMES = {
    # The model.
    "arch": "model", "n_layers": "depth", "d_model": "hidden_size n_embd", "vocab_size": "vocab",
    "init_from": "model_name_or_path model_name", "use_activation_checkpoint": "gradient_checkpointing",
    "it comes with --arch": "bias", "the MLP's width is --d-ff": "mlp_ratio",
    # The data and the batch.
    "train_data": "dataset data", "val_data": "validation_data", "val_ratio": "val_split val_size",
    "tokenizer_name": "tokenizer", "prompt": "start",
    "seq_len": "block_size max_seq_length max_seq_len sequence_length context_length",
    "batch_size": "batch micro_batch_size device_batch_size per_device_train_batch_size per_device_eval_batch_size",
    "global_batch_tokens": "total_batch_size", "grad_accum_steps": "gradient_accumulation_steps",
    # The length of the run, the optimizer and its schedule.
    "num_steps": "steps max_steps max_iters num_iterations lr_decay_iters",
    "num_tokens": "tokens train_tokens total_tokens param_data_ratio target_param_data_ratio",
    "num_epochs": "epochs num_train_epochs", "optimizer": "optim", "weight_decay": "wd", "beta1": "adam_beta1",
    "beta2": "adam_beta2", "grad_clip_norm": "max_grad_norm grad_clip", "muon_lr": "matrix_lr",
    "lr": "learning_rate embedding_lr unembedding_lr", "min_lr": "final_lr final_lr_frac",
    "lr_scheduler": "lr_scheduler_type decay_lr", "none": "constant constant_with_warmup",
    "warmup_steps": "warmup warmup_iters warmup_ratio",
    "decay_steps": "decay decay_iters decay_ratio lr_decay_steps cooldown cooldown_steps cooldown_ratio warmdown "
                   "warmdown_steps warmdown_iters warmdown_ratio",
    "docs/extending.md has it as a diff": "z_loss ema",
    # The device and precision.
    "amp_dtype": "dtype precision bf16 fp16", "bf16": "bfloat16", "fp16": "float16", "cuda": "gpu",
    "no_amp": "fp32 float32", "compile": "torch_compile",
    "train_fsdp.py shards the model over all ranks": "fsdp use_fsdp tp tensor_parallel use_tensor_parallel",
    # Evaluation, reports and checkpoints.
    "eval_steps": "eval_every eval_interval eval_strategy evaluation_strategy val_interval",
    "eval_tokens": "eval_iters", "log_steps": "log_every log_interval logging_steps", "sample_steps": "sample_every",
    "run python evaluate.py": "eval_only",
    "checkpoint_path": "output_dir out_dir ckpt", "overwrite": "overwrite_output_dir", "keep_last": "save_total_limit",
    "save_steps": "save_every save_interval always_save_checkpoint checkpoint_every",
    "resume": "resume_from resume_from_step resume_from_checkpoint wandb_resume",
    "keep_optimizer": "load_optimizer load_optimizer_state",
    "the best weights are kept in .best.pt": "early_stop early_stopping patience",
    # Weights & Biases.
    "use_wandb": "wandb wandb_log enable_wandb report_to", "wandb": "metrics metric_logger",
    "wandb_run_name": "run run_name name", "wandb_run_id": "run_id wandb_id", "wandb_run_mode": "run_mode",
    "wandb_project": "project", "wandb_entity": "entity", "wandb_group": "group", "wandb_job_type": "job_type",
    "wandb_tags": "tags", "wandb_notes": "notes", "wandb_rank_scope": "rank_scope",
    "after the run: python wandb_tools.py download RUN.pt": "download_logs"}
ELSEWHERE = {other: ours for ours, others in OTHER_NAMES.items() for other in others.split()}


def plain(name):
    """--batch-size → batch_size"""
    return name.lstrip("-").replace("-", "_")


def nearest(word, known):
    """"; did you mean …?" with the one of `known` that `word` may have meant; "" if there is none."""
    names = {plain(name): name for name in known}
    meant = ELSEWHERE.get(plain(word), "")
    # Typing errors score above 0.8, words of another meaning below.
    close = [meant] if meant in names else difflib.get_close_matches(plain(word), names, n=1, cutoff=0.8)
    return f"; did you mean {names[close[0]]}?" if close else ""


def advice(word, known):
    """For an unknown name: what to do instead, if OTHER_NAMES says so; else as `nearest`."""
    meant = ELSEWHERE.get(plain(word), "")
    return f"; {meant}" if " " in meant else nearest(word, known)
