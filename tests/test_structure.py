"""The layout that the README promises: who imports whom, and how long a file may be."""

import ast
import re

import pytest
from conftest import ROOT, SOURCES

from mini_llm.config import flag, flag_fields
from train import Config

ALLOWED = {  # besides errors.py, which every file may import
    "errors": set(),
    "suggestions": set(),
    "config": {"processes", "suggestions"},
    "files": set(),
    "progress": set(),
    "toy": set(),
    "hardware": {"config"},
    "kernels": set(),
    "model": {"config", "kernels"},
    "optim": {"config"},
    "archive": {"files", "hardware"},
    "checkpoint": {"config", "files", "processes"},
    "resume": {"archive", "checkpoint", "config", "files", "hardware"},
    "saver": {"archive", "checkpoint", "files", "hardware", "resume"},
    "tokenizer": {"config", "files"},
    "holdout": {"tokenizer"},
    "text": {"holdout", "shards", "tokenizer"},
    "shards": {"files", "tokenizer"},
    "token_cache": {"files", "holdout", "processes", "shards", "text", "tokenizer", "toy", "progress"},
    "data": {"config", "files", "shards", "token_cache", "tokenizer"},
    "generate": {"config", "hardware", "model", "pretrained", "tokenizer"},
    "evaluate": {"config", "files", "hardware", "model", "pretrained", "shards", "text", "token_cache", "tokenizer",
                 "progress"},
    "processes": set(),
    "wandb_runs": {"config", "files"},
    "wandb_sink": {"archive", "files", "processes", "wandb_runs"},
    "wandb_errors": set(),
    "wandb_client": {"files", "processes", "wandb_errors", "wandb_runs"},
    "wandb_follower": {"processes", "wandb_client", "wandb_errors", "wandb_runs"},
    "wandb_tools": {"config", "files", "processes", "wandb_client", "wandb_errors", "wandb_runs"},
    "sweep": {"config", "wandb_client", "wandb_runs", "wandb_tools", "train"},
    "ranks": {"optim", "hardware"},
    "rendezvous": {"ranks"},
    "meter": {"hardware"},
    "watchdog": {"files"},
    "facts": {"config", "hardware", "kernels", "wandb_runs"},
    "tracking": {"config", "files", "hardware", "plots", "saver", "sinks", "wandb_runs", "wandb_sink", "progress"},
    "sinks": {"files"},
    "train": {"config", "hardware", "model", "optim", "checkpoint", "data", "evaluate", "facts", "generate", "meter",
              "pretrained", "processes", "resume", "saver", "tracking", "wandb_runs", "watchdog", "world"},
    "world": {"config", "hardware", "optim"},
    "shared_memory": {"ranks"},
    "train_ddp": {"hardware", "processes", "ranks", "rendezvous", "shared_memory", "train", "world"},
    "train_fsdp": {"hardware", "model", "train", "train_ddp"},
    "hugging_face": {"model"},
    "pretrained": {"archive", "checkpoint", "config", "files", "hugging_face", "model", "resume", "tokenizer"},
    "export": {"config", "data", "files", "generate", "hardware", "hugging_face", "model", "optim", "pretrained",
               "tokenizer"},
    "prepare": {"config", "data", "pretrained", "tracking", "train"},
    "plots": set(),
    "report": {"config", "files", "plots"},
}
LONGEST = {"train": 300, "train_ddp": 120, "train_fsdp": 135, "model": 350}


def imports(path):
    """Every module that a file imports, at its top or inside a function; ours by the names of their files."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.module == "mini_llm":
            yield from (alias.name.removeprefix("mini_llm.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.removeprefix("mini_llm.")


def test_imports_run_one_way():
    assert ALLOWED.keys() <= {path.stem for path in SOURCES}
    for path in SOURCES:
        ours = set(imports(path)) & ALLOWED.keys() - {"errors"}
        allowed = ALLOWED.get(path.stem, ours)  # a new file may import what it wants, until it is in the table
        assert ours <= allowed, f"{path.name} imports {ours - allowed}"


def test_only_the_modes_know_of_processes():
    for path in SOURCES:
        source = ast.parse(path.read_text())
        knows = any(name.startswith("torch.distributed") for name in imports(path)) or any(
            isinstance(node, ast.Attribute) and node.attr == "distributed" for node in ast.walk(source))
        assert not knows or path.stem in ("ranks", "rendezvous") or path.stem.startswith("train_"), path.name


def test_every_file_can_be_read_in_one_go():
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST.get(path.stem, 450), f"{path.name} has {lines} lines"


@pytest.mark.parametrize("mode", ["world", "train_ddp", "train_fsdp"])
def test_a_mode_has_no_loop_of_its_own(mode):
    nodes = list(ast.walk(ast.parse((ROOT / f"{mode}.py").read_text())))
    assert not any(isinstance(node, ast.While) for node in nodes)
    assert "backward" not in {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", [path for pattern in ("*.md", "docs/*.md", "bench/*.md")
                                  for path in sorted(ROOT.glob(pattern))], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert links or path.name != "README.md"
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (path.parent / link.partition("#")[0]).exists(), link


def test_the_index_of_the_log_names_its_entries():
    _, index, *days = re.split(r"^## ", (ROOT / "LOG.md").read_text(), flags=re.M)
    days = {day[5:10]: day for day in days}
    _, *entries = re.findall(r"\| ([^|\s][^|]*) \|$", index, re.M)  # below the table's head
    assert entries
    for day, title in (entry.split(" ", 1) for entry in entries):
        assert f"**{title}" in days[day], title


def test_readme_lists_every_flag():
    table = (ROOT / "README.md").read_text().split("\n## Flags\n")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    listed = [word.replace("--no-", "--") for word in re.findall(r"--[a-z0-9-]+", "\n".join(rows))]
    ours = {flag(name) for name in flag_fields(Config)}
    assert set(listed) == ours, set(listed) ^ ours
    assert len(listed) == len(set(listed))


def test_readme_lists_every_file():
    table = (ROOT / "README.md").read_text().split("\n## How it is laid out\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in SOURCES} - {"__init__.py"}
