"""What an unknown flag or value may have meant: it has a typing error, or is another project's name for one of ours."""

import difflib

# Our flags, values and TOML tables → their names in other projects, such as nanoGPT, nanochat, torchtitan and the
# Hugging Face Trainer. With a space: what to say where no flag is like it.
OTHER_NAMES = {
    # The model.
    "arch": "model model.name", "n_layers": "depth", "d_model": "hidden_size n_embd", "vocab_size": "vocab",
    "init_from": "model_name_or_path model_name initial_checkpoint_dir",
    "use_activation_checkpoint": "gradient_checkpointing",
    "it comes with --arch": "bias", "the MLP's width is --d-ff": "mlp_ratio",
    # The data and the batch.
    "train_data": "dataset data dataset_name dataset_path train_file input_bin",
    "val_data": "validation_data validation_file input_val_bin",
    "val_ratio": "val_split val_size validation_split_percentage",
    "tokenizer_name": "tokenizer tokenizer_dir", "prompt": "start",
    "seq_len": "block_size max_seq_length max_seq_len sequence_length context_length",
    "batch_size": "batch micro_batch_size local_batch_size device_batch_size per_device_train_batch_size "
                  "per_device_eval_batch_size",
    "global_batch_tokens": "total_batch_size", "grad_accum_steps": "gradient_accumulation_steps",
    "--global-batch-tokens counts it in tokens": "global_batch_size",
    # The length of the run, the optimizer and its schedule.
    "num_steps": "steps max_steps max_iters num_iterations lr_decay_iters",
    "num_tokens": "tokens train_tokens total_tokens train.max_tokens param_data_ratio target_param_data_ratio",
    "num_epochs": "epochs num_train_epochs", "optimizer": "optim optimizer.name", "weight_decay": "wd",
    "beta1": "adam_beta1", "beta2": "adam_beta2", "grad_clip_norm": "max_grad_norm max_norm grad_clip",
    "lr": "learning_rate embedding_lr unembedding_lr", "muon_lr": "matrix_lr",
    "min_lr": "final_lr final_lr_frac min_lr_factor learning_rate_decay_frac",
    "lr_scheduler": "lr_scheduler_type decay_type decay_lr", "none": "constant constant_with_warmup",
    "warmup_steps": "warmup warmup_iters warmup_ratio lr_warmup_steps lr_warmup_fraction",
    "decay_steps": "decay decay_iters decay_ratio lr_decay_steps cooldown cooldown_steps cooldown_ratio warmdown "
                   "warmdown_steps warmdown_iters warmdown_ratio",
    "docs/extending.md has it as a diff": "z_loss ema",
    # The device and precision.
    "device": "device_type use_cpu", "cuda": "gpu", "amp_dtype": "dtype precision bf16 fp16", "bf16": "bfloat16",
    "fp16": "float16", "no_amp": "fp32 float32", "compile": "torch_compile", "deterministic": "full_determinism",
    "train_fsdp.py shards the model over all ranks": "fsdp use_fsdp zero_stage data_parallel_shard_degree tp "
                                                     "tensor_parallel use_tensor_parallel tensor_parallel_degree",
    # Evaluation, reports and checkpoints.
    "eval_steps": "eval_every eval_interval eval.interval eval_strategy evaluation_strategy val_interval "
                  "val_loss_every validation.freq",
    "eval_tokens": "eval_iters eval.max_iters val_max_steps validation.steps", "sample_steps": "sample_every",
    "log_steps": "log_every log_interval log_freq logging_steps", "run python evaluate.py": "eval_only",
    "it is python generate.py's": "max_new_tokens temperature top_k num_samples",
    "checkpoint_path": "output_dir out_dir ckpt model_tag checkpoint.folder", "overwrite": "overwrite_output_dir",
    "save_steps": "save_every save_interval save_strategy always_save_checkpoint checkpoint_every checkpoint.interval",
    "keep_last": "save_total_limit keep_latest_k", "keep_optimizer": "load_optimizer load_optimizer_state",
    "resume": "resume_from resume_from_step resume_from_checkpoint wandb_resume",
    "the best weights are kept in .best.pt": "early_stop early_stopping patience load_best_model_at_end",
    "use_tensorboard": "enable_tensorboard", "use_profiler": "enable_profiling",
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
    whole = plain(word).replace(".", "_")  # --eval.steps is --eval-steps, not --num-steps
    close = [name for name in (whole, _meaning(word)) if name in names]
    for part in _last_part(word), whole:  # typing errors score above 0.8, words of another meaning below
        close += difflib.get_close_matches(part, names, n=1, cutoff=0.8)
    return f"; did you mean {names[close[0]]}?" if close else ""


def advice(word, known):
    """For an unknown name: what to do instead, if OTHER_NAMES says so; else as `nearest`."""
    meant = _meaning(word)
    return f"; {meant}" if " " in meant else nearest(word, known)


def _meaning(word):
    """What OTHER_NAMES has for it, or else for its last part; or ""."""
    return ELSEWHERE.get(plain(word)) or ELSEWHERE.get(_last_part(word), "")


def _last_part(word):
    """--training.seq_len, as in litgpt and torchtitan → seq_len"""
    return plain(word).rpartition(".")[2]
