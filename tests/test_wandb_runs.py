"""Who writes which W&B run, and where its settings come from: pure functions, on every row of their tables."""

import json
import os
import shutil
import subprocess
from contextlib import nullcontext

import pytest

from mini_llm import wandb_runs
from mini_llm.errors import UserError
from mini_llm.processes import only_one
from mini_llm.wandb_runs import (
    Job,
    WandbConfig,
    distributed_info,
    plan_run,
    recalled,
    remember,
    resolve_run,
    sweep_trial,
    with_environment,
)


def ranks(nodes, per_node):
    """The distributed_info of every rank."""
    class World:
        size, local_size = nodes * per_node, per_node

    for rank in range(nodes * per_node):
        World.rank, World.local_rank, World.node_rank = rank, rank % per_node, rank // per_node
        yield distributed_info(World)


def test_the_distributed_info_of_a_rank_is_what_torchrun_says():
    assert list(ranks(2, 2))[3] == dict(rank=3, world_size=4, local_rank=1, local_world_size=2, worker_index=1,
                                        num_workers=2)


#   nodes, mode, scope → of four ranks: (run id, group, primary) or None
SINGLE = {
    ("auto", "global"): [("b", "", True), None, None, None],
    ("auto", "worker"): [("b", "", True), None, None, None],
    ("shared", "global"): [("b", "", True), ("b", "", False), ("b", "", False), ("b", "", False)],
    ("shared", "worker"): [("b", "", True), ("b", "", False), ("b", "", False), ("b", "", False)],
    ("new", "global"): [(f"b-rank-{rank}", "b", True) for rank in range(4)],
    ("new", "worker"): [(f"b-rank-{rank}", "b", True) for rank in range(4)],
}
MULTI = {
    ("auto", "global"): [("b", "", True), None, None, None],
    ("auto", "worker"): [("b-worker-0", "", True), None, ("b-worker-1", "", True), None],
    ("shared", "global"): [("b", "", True), ("b", "", False), ("b", "", False), ("b", "", False)],
    ("shared", "worker"): [("b-worker-0", "", True), ("b-worker-0", "", False), ("b-worker-1", "", True),
                           ("b-worker-1", "", False)],
    ("new", "global"): [(f"b-rank-{rank}", "b", True) for rank in range(4)],
    ("new", "worker"): [("b-worker-0-rank-0", "b-worker-0", True), ("b-worker-0-rank-1", "b-worker-0", True),
                        ("b-worker-1-rank-0", "b-worker-1", True), ("b-worker-1-rank-1", "b-worker-1", True)],
}


@pytest.mark.parametrize("nodes, table", [(1, SINGLE), (2, MULTI)], ids=["one node", "two nodes"])
def test_every_cell_of_run_modes_and_rank_scopes(nodes, table):
    for (mode, scope), expected in table.items():
        plans = [plan_run(mode, scope, "b", info) for info in ranks(nodes, 4 // nodes)]
        assert [plan and (plan.run_id, plan.group, plan.primary) for plan in plans] == expected, (mode, scope)
        assert all(plan.shared == (mode == "shared") for plan in plans if plan)


def test_ranks_log_their_own_figures_where_more_than_one_writes():
    suffixes = {(mode, scope): [plan and plan.suffix for plan in (plan_run(mode, scope, "b", info)
                                                                  for info in ranks(2, 1))]
                for mode, scope in MULTI}
    assert suffixes == {("auto", "global"): [None, None], ("auto", "worker"): ["", ""], ("shared", "global"):
                        ["/0", "/1"], ("shared", "worker"): ["/0", "/1"], ("new", "global"): ["", ""],
                        ("new", "worker"): ["", ""]}


def test_a_flag_wins_over_the_environment_and_that_over_the_default():
    environ = {"WANDB_PROJECT": "theirs", "WANDB_TAGS": "a, b,", "WANDB_MODE": "dryrun", "WANDB_INIT_TIMEOUT": "7",
               "WANDB_RUN_ID": "id-1", "WANDB_RUN_GROUP": "group", "WANDB_DIR": "/scratch"}
    found = with_environment(WandbConfig(), environ)
    assert (found.wandb_project, found.wandb_tags, found.wandb_mode, found.wandb_init_timeout, found.wandb_run_id,
            found.wandb_group, found.wandb_dir) == ("theirs", ["a", "b"], "offline", 7.0, "id-1", "group", "/scratch")
    assert found.wandb_finish_timeout == 60 and found.wandb_entity == ""
    assert with_environment(WandbConfig(wandb_log_checkpoints="last"), {}).wandb_finish_timeout == 600
    given = WandbConfig(wandb_project="mine", wandb_tags=["c"], wandb_mode="online", wandb_init_timeout=3.0)
    found = with_environment(given, environ)
    assert (found.wandb_project, found.wandb_tags, found.wandb_mode, found.wandb_init_timeout) == (
        "mine", ["c"], "online", 3.0)
    assert with_environment(WandbConfig(), {}).wandb_project == "mini-llm"


def test_a_home_folder_is_one_wherever_it_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for cfg, environ in (WandbConfig(wandb_dir="~/runs"), {}), (WandbConfig(), dict(WANDB_DIR="~/runs")):
        assert with_environment(cfg, environ).wandb_dir == "/home/me/runs"


def test_best_checkpoints_are_needed_only_where_they_are_uploaded():
    for mode, on, policy, refused in (("offline", True, "best", True), ("disabled", True, "best", False),
                                      ("offline", False, "best", False), ("offline", True, "last", False)):
        cfg = WandbConfig(use_wandb=on, wandb_mode=mode, wandb_log_checkpoints=policy)
        cfg.require_best(saved=True)
        with pytest.raises(UserError, match="take last, or add --save-best") if refused else nullcontext():
            cfg.require_best(saved=False)


def test_what_wandb_init_and_wandb_offline_write_comes_after_the_environment(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\nproject = 100%\nentity = us\n")
    here = dict(WANDB_DIR=str(tmp_path))
    found = with_environment(WandbConfig(), here)
    assert (found.wandb_mode, found.wandb_project, found.wandb_entity) == ("offline", "100%", "us")
    # --wandb-dir says where runs go: W&B's commands have written without knowing of it.
    assert with_environment(WandbConfig(wandb_dir=str(tmp_path / "runs")), here).wandb_mode == "offline"
    found = with_environment(WandbConfig(wandb_project="mine"), here | dict(WANDB_MODE="online"))
    assert (found.wandb_mode, found.wandb_project, found.wandb_entity) == ("online", "mine", "us")
    (tmp_path / ".wandb").mkdir()  # where there is one, W&B's commands write there
    (tmp_path / ".wandb" / "settings").write_text("[default]\nmode = disabled\n")
    assert with_environment(WandbConfig(), here).wandb_mode == "disabled"
    (tmp_path / ".wandb" / "settings").write_text("torn")
    assert with_environment(WandbConfig(), here).wandb_mode == "online"


@pytest.mark.parametrize("environ", [{"WANDB_MODE": "bogus"}, *({"WANDB_FINISH_TIMEOUT": seconds} for seconds in
                                                               ("soon", "0", "-5", "nan", "inf"))])
def test_an_environment_that_makes_no_sense_is_named(environ):
    with pytest.raises(UserError, match=next(iter(environ))):
        with_environment(WandbConfig(), environ)


@pytest.mark.parametrize("wrong", [dict(wandb_run_mode="shared", wandb_mode="offline"), dict(wandb_run_id="a/b"),
                                   dict(wandb_run_id="b\u00fccher"),
                                   dict(wandb_project="a/b"), dict(wandb_project="runs"), dict(wandb_tags=["x" * 65]),
                                   dict(wandb_job_type="x" * 65), dict(wandb_run_name="x" * 129)])
def test_settings_that_wandb_would_refuse_are_refused_at_once(wrong):
    WandbConfig(**wrong).validate()  # but not where W&B is off
    with pytest.raises(UserError, match="--wandb-"):
        WandbConfig(use_wandb=True, **wrong).validate()


def test_what_wandb_just_takes_is_not_refused():
    WandbConfig(use_wandb=True, wandb_mode="offline", wandb_run_id="i" * 64, wandb_project="p" * 128,
                wandb_run_name="n" * 128, wandb_group="g" * 128, wandb_job_type="j" * 64,
                wandb_tags=["t", "t" * 64]).validate()


def test_a_resumed_run_stays_in_its_project(tmp_path):
    path = tmp_path / "c.wandb.json"
    remember(path, "kept", Job(init=dict(project="ours", entity=None, name="first"), config={}), sent={})
    before = recalled(path)
    assert before["base"] == "kept"
    for given, environ, project in (("", {}, "ours"), ("", dict(WANDB_PROJECT="theirs"), "theirs"),
                                    ("mine", dict(WANDB_PROJECT="theirs"), "mine")):
        found = with_environment(WandbConfig(wandb_project=given), environ, before["init"])
        assert (found.wandb_project, found.wandb_entity, found.wandb_run_name) == (project, "", "")
    path.write_text(json.dumps(dict(base="kept", was="other", init={})))
    for base, was in ("kept", "other"), ("new", None):  # an id that it was sent as is of that run alone
        remember(path, base, Job(init={}, config={}), sent={})
        assert recalled(path).get("was") == was
    path.write_text(json.dumps(dict(base="kept", init=dict(id="kept", config="/etc/x.yaml", save_code=True))))
    assert recalled(path)["init"] == dict(id="kept"), "another's file is not to say what wandb.init reads"
    for damaged in ("torn", "[]", '{"base": "x"}', '{"base": "x", "init": 1}'):
        path.write_text(damaged)
        assert recalled(path) == {}


def test_a_resume_goes_on_with_the_run_of_its_checkpoint_unless_told_another(tmp_path):
    def resolved(checkpoint, resumes=True, **flags):
        return resolve_run(WandbConfig(**flags), path, resumes, checkpoint, info)

    path, (info,) = tmp_path / "c.wandb.json", ranks(1, 1)
    remember(path, "kept", Job(init=dict(project="ours", entity=None, id="kept"), config={}), sent={})
    for checkpoint, project, run_id in ("kept", "ours", "kept"), ("", "ours", "kept"), ("other", "mini-llm", "other"):
        cfg, found = resolved(checkpoint)
        assert (cfg.wandb_project, found) == (project, run_id)
    assert resolved("kept", wandb_run_id="mine")[1] == "mine" and len(resolved("", resumes=False)[1]) == 8
    assert resolved("kept", wandb_run_mode="shared")[0].wandb_run_mode == "auto", "it was not shared before"
    path.write_text("torn")
    assert resolved("kept")[1] == "kept" and resolved("kept")[0].wandb_project == "mini-llm"


def test_a_sweep_decides_the_project_of_its_trials():
    trial = dict(WANDB_SWEEP_ID="s", WANDB_RUN_ID="r", WANDB_PROJECT="of the sweep")
    assert with_environment(WandbConfig(wandb_project="of a recipe"), trial).wandb_project == "of the sweep"


def test_uncommitted_changes_are_kept_unless_code_is_not_wanted(monkeypatch, tmp_path):
    assert wandb_runs.git("rev-parse", "HEAD", "no-such-name") == "", "it fails, and prints all the same"
    if not shutil.which("git"):
        pytest.skip("needs git")
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # a hook's lead to the repository it is of
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr(wandb_runs, "SOURCE", tmp_path / "code")  # within a repository that has more
    (tmp_path / "code").mkdir()
    for content in "was\n", "mine\n":
        for name in "code/train.py", ".env":
            (tmp_path / name).write_text(content)
        if content == "was\n":
            for words in "init -q", "add .", "-c user.name=a -c user.email=a commit -qm a":
                subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    (tmp_path / "code" / "untracked").write_text("secret\n")
    diff = wandb_runs.uncommitted()
    assert diff.endswith("+mine\n") and diff.count("+mine") == 1 and ".env" not in diff and "secret" not in diff
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    assert wandb_runs.uncommitted() == ""


def test_a_lock_in_a_folder_that_cannot_be_written_is_held_by_nobody(tmp_path):
    with only_one(tmp_path / "missing" / "lock") as alone:
        assert alone


def test_one_process_sends_a_run(tmp_path):
    with only_one(tmp_path / "lock") as first, only_one(tmp_path / "lock", patience=0.3) as second:
        assert first and not second
    with only_one(tmp_path / "lock") as again:
        assert again


def test_a_trial_of_a_sweep_is_one_run_and_reports_whether_or_not_its_command_says_so(monkeypatch):
    """That of `wandb sweep` has the parameters and no more."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    (trial := WandbConfig()).validate()
    assert trial.use_wandb
    with pytest.raises(UserError, match="a trial of a sweep is one run"):
        WandbConfig(use_wandb=True, wandb_run_mode="new").validate()


def test_a_trial_of_a_sweep_is_known_by_the_agents_environment():
    assert sweep_trial({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}) == "r"
    assert sweep_trial({"WANDB_RUN_ID": "r"}) == ""
