import argparse
import math
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from conftest import ROOT, environment

from data import BatchConfig
from mini_llm.config import (
    LAUNCH_FLAGS,
    arg,
    flag,
    flag_fields,
    flatten,
    is_launch_flag,
    parse,
    part_of,
    positive,
    refuse_unknown,
    switched_on,
)
from mini_llm.errors import UserError, first_line, one_line_errors
from mini_llm.files import without_infinity
from optim import OptimConfig
from prepare import Preparation
from train import Config


@dataclass
class Engine:
    """Engine"""

    cylinders: int = arg(4, "how many", ge=1, le=16)
    power: float = arg(1.5, "in kW", gt=0)
    fuel: str = arg("petrol", "what burns", choices=("petrol", "diesel"))
    turbo: bool = arg(False, "with a turbo")
    heated: bool | None = arg(None, "unset: by the weather")
    idle_speed: int | None = arg(None, "unset: by the fuel", ge=0)


@dataclass
class Trip:
    """Trip"""

    ALTERNATIVES = "days", "weeks"
    days: int = arg(1, "how long")
    weeks: float = arg(0.0, "how long")
    stops: list[str] = arg([], "places")
    resume: str = arg("", "go on", const="latest")


@dataclass
class Car:
    """A car."""

    engine: Engine = field(default_factory=Engine)
    trip: Trip = field(default_factory=Trip)


def test_defaults_then_toml_then_flags(tmp_path):
    file = tmp_path / "car.config.toml"  # the name of a run's own, which has its path: this program has none
    file.write_text('stops = ["a", "b"]\n[engine]\ncylinders = 6\npower = 3\nidle-speed = 700\n')
    car = parse(Car, ["--config", str(file), "--cylinders", "8"])
    assert car.engine == Engine(cylinders=8, power=3.0, idle_speed=700)
    assert car.given == {"stops", "cylinders", "power", "idle_speed"}
    assert car.trip.stops == ["a", "b"]
    assert parse(Car, ["--config", str(file), "--stops", "c", "--stops", "d", "e"]).trip.stops == ["c", "d", "e"]
    assert parse(Car, []) == Car()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows editors begin a file
    assert parse(Car, ["--config", str(file)]).engine.cylinders == 6


def test_of_several_files_later_ones_win_and_flags_over_all(tmp_path):
    (one := tmp_path / "one.toml").write_text('cylinders = 6\npower = 3\nstops = ["a", "b"]\n')
    (two := tmp_path / "two.toml").write_text('[engine]\npower = 5\nidle-speed = 700\n[trip]\nstops = ["c"]\n')
    car = parse(Car, ["--idle-speed", "800", "--config", str(one), "--config", str(two)])
    assert car.engine == Engine(cylinders=6, power=5.0, idle_speed=800) and car.trip.stops == ["c"]
    assert parse(Car, ["--config", str(two), "--config", str(one)]).engine.power == 3
    assert parse(Car, []).engine == Engine(), "nothing of one call is left for the next"


def test_of_two_ways_to_say_the_same_the_later_source_decides(tmp_path):
    (toml := tmp_path / "c.toml").write_text("days = 9\nweeks = 0\n")
    (other := tmp_path / "d.toml").write_text("weeks = 2\n")
    for argv, days, weeks in ([[], 9, 0], [["--weeks", "3"], 1, 3], [["--config", str(other)], 1, 2],
                              [["--config", str(other), "--days", "4"], 4, 0], [["--weeks", "0"], 9, 0]):
        trip = parse(Car, ["--config", str(toml), *argv]).trip
        assert (trip.days, trip.weeks) == (days, weeks), argv
    with pytest.raises(UserError, match="^--days and --weeks: one decides the other; give one of them$"):
        parse(Car, ["--weeks", "3", "--days", "1"])
    other.write_text("weeks = 2\ndays = 1\n")
    with pytest.raises(UserError, match=r"^--config \S+d\.toml: --days and --weeks: one decides the other"):
        parse(Car, ["--config", str(other)])


def test_a_length_in_epochs_or_tokens_is_one_in_whole_steps():
    def steps(**length):
        return OptimConfig(num_steps=9, **length).in_steps(8, 32, 800).num_steps

    assert steps() == 9 and steps(num_epochs=1e-9) == steps(num_tokens=1) == 1
    assert [steps(num_epochs=n / 100) for n in range(1, 2000)] == list(range(1, 2000))
    assert [steps(num_epochs=0.011), steps(num_tokens=256), steps(num_tokens=257)] == [2, 1, 2]


def test_a_runs_own_config_is_of_that_run_after_a_recipe_too(tmp_path):
    (recipe := tmp_path / "recipe.toml").write_text('checkpoint_path = "recipe.pt"\ngrad_accum_steps = 2\n')
    (own := tmp_path / "c.config.toml").write_text("num_steps = 7\n")
    cfg = parse(Config, ["--config", str(recipe), "--config", str(own)])
    assert cfg.checkpoint.checkpoint_path == str(tmp_path / "c.pt") and cfg.batch.grad_accum_steps == 2
    own.rename(tmp_path / "c.toml")
    assert parse(Config, ["--config", str(tmp_path / "c.toml")]).checkpoint == Config().checkpoint, "else of none"


BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}  # so that what is printed may be written at the end only


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at its end", "midway"])
def test_a_command_whose_reader_leaves_ends_without_a_word(lines):
    code = ("from mini_llm.errors import one_line_errors\n"
            f"with one_line_errors():\n    print('word\\n' * {lines}, end='')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=BUFFERED)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 1)


@pytest.mark.parametrize(("last", "code", "said"), [
    ("print('word')", 2, ["error: the output: No space left on device; make room there"]),
    ("raise OSError(27, 'File too large', 'a.html')", 2, ["error: a.html: File too large; make room there"]),
    ("raise OSError(5, 'Input/output error')", 1, ["OSError: [Errno 5] Input/output error"]),
    ("raise KeyboardInterrupt", 130, []), ("import os; os.kill(os.getpid(), 15); print()", 143, [])], ids=str)
def test_a_command_ends_in_one_line_or_none_where_it_is_known_why(last, code, said):
    program = f"from mini_llm.errors import one_line_errors\nwith one_line_errors():\n    {last}"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
                              env=BUFFERED)
    lines = done.stderr.splitlines()
    assert done.returncode == code and (lines[-1:] if code == 1 else lines) == said, done.stderr


def test_an_error_is_quoted_by_its_first_line():
    assert first_line(RuntimeError("\none\ntwo")) == "one" and first_line(ValueError()) == "ValueError"
    assert first_line(RuntimeError("x" * 9999)) == "x" * 200


def test_launch_flags_are_flags():
    assert flatten(Config()).keys() >= LAUNCH_FLAGS
    assert is_launch_flag("resume") and is_launch_flag("wandb_notes") and not is_launch_flag("lr")


def test_what_json_has_no_number_for_is_null():
    record = without_infinity({"ppl": math.inf, "loss": math.nan, "step": 3, "lr": 0.1, "name": "inf",
                               "ci95": [math.nan, 1.0], "losses": {"a": -math.inf}})
    assert record == {"ppl": None, "loss": None, "step": 3, "lr": 0.1, "name": "inf", "ci95": [None, 1.0],
                      "losses": {"a": None}}


def test_flags_of_every_kind():
    car = parse(Car, ["--turbo", "--no-heated", "--idle_speed=5", "--stops", "x", "y", "--resume"])
    assert car.engine == Engine(turbo=True, heated=False, idle_speed=5)
    assert car.trip == Trip(stops=["x", "y"], resume="latest")
    assert parse(Car, ["--resume", "auto"]).trip.resume == "auto"
    Trip().stops.append("z")
    assert Trip().stops == [], "a list of its own"
    assert flatten(car)["idle_speed"] == 5
    assert part_of(Engine, dict(cylinders=8, days=2)) == Engine(cylinders=8), "as of a checkpoint before or after them"


def test_variables_are_switched_on_by_any_word_for_yes(monkeypatch):
    for word, on in {"1": True, "True": True, "YES": True, "on": True, "": False, "0": False, "off": False}.items():
        monkeypatch.setenv("A_SWITCH", word)
        assert switched_on("A_SWITCH") is on, word
    monkeypatch.delenv("A_SWITCH")
    assert not switched_on("A_SWITCH")


def test_what_there_must_be_one_of_is_counted_from_one():
    assert positive("1") == 1
    for text in ("0", "-1", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            positive(text)


def test_a_program_may_refuse_its_settings_as_a_whole():
    with pytest.raises(UserError, match="^--dry-run: this only tokenizes"):
        parse(Preparation, ["--dry-run"])


@pytest.mark.parametrize("argv, words", [
    (["--cylindres", "4"], ["--cylindres", "did you mean --cylinders?"]),
    (["--cyl", "4"], ["--cyl is not known"]),
    (["--cylinders", "four"], ["--cylinders four", "a whole number", "4"]),
    (["--cylinders", "2.5"], ["--cylinders 2.5", "a whole number"]),
    (["--cylinders", "9" * 400], ["a whole number"]),
    (["--cylinders", "0"], ["--cylinders 0", "at least 1"]),
    (["--cylinders", "99"], ["at most 16"]),
    (["--power", "-1"], ["--power -1", "greater than 0"]),
    (["--power", "nan"], ["--power nan", "a finite number"]),
    (["--power", "inf"], ["a finite number"]),
    (["--fuel", "deisel"], ["--fuel deisel", "did you mean diesel?"]),
    (["--config", "missing.toml"], ["missing.toml", "No such file"]),
    (["stray"], ["stray", "not known"]),
    (["configs/x.toml", "--turbo"], ["argument configs/x.toml: give it as --config configs/x.toml"]),
    (["config/train_gpt2.py"], ["argument config/train_gpt2.py: write it as TOML, as in configs/, and give it as "
                                "--config config/train_gpt2.toml"]),
    (["--power"], ["--power", "expected one argument"]),
])
def test_mistakes_are_named_with_a_way_out(argv, words):
    with pytest.raises(UserError) as caught:
        parse(Car, argv)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("toml, words", [
    ("cylindres = 4", ["key cylindres", "did you mean cylinders?"]),
    ("[motor]\ncylinders = 4", ["section motor"]),
    ("cylinders = '4x'", ["a whole number"]),
    ("cylinders = 4.5", ["a whole number"]),
    ("turbo = 1", ["turbo", "expected bool"]),
    ("cylinders = true", ["cylinders", "expected int"]),
    ("fuel = true", ["fuel", "expected str"]),
    ("cylinders = ", ["not valid TOML"]),
    ("power = nan", ["a finite number"]),
    ("cylinders = 4\n[engine]\ncylinders = 8", ["cylinders is there twice"]),
    ("no-turbo = true", ["key no-turbo is not known; write turbo = false"]),
])
def test_mistakes_in_toml_are_named_too(tmp_path, toml, words):
    file = tmp_path / "car.toml"
    file.write_text(toml)
    with pytest.raises(UserError) as caught:
        parse(Car, ["--config", str(file)])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_accumulation_follows_from_the_tokens_of_a_step():
    batch = BatchConfig(batch_size=4, global_batch_tokens=3072)
    assert [batch.accum_steps(ranks, 32) for ranks in (1, 2, 3, 24)] == [24, 12, 8, 1]
    with pytest.raises(UserError, match="not a multiple of --batch-size 4 x 5 ranks x --seq-len 32 = 640; try 3200"):
        batch.accum_steps(5, 32)
    with pytest.raises(UserError, match="2,000,000 micro-batches in a step; lower it, or raise --batch-size"):
        BatchConfig(batch_size=1, global_batch_tokens=64_000_000).accum_steps(1, 32)
    assert BatchConfig(grad_accum_steps=3).accum_steps(5, 32) == 3 and BatchConfig().accum_steps(5, 32) == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.name)
def test_every_recipe_is_valid(file):
    cfg = parse(Config, ["--config", str(file)])
    assert cfg.checkpoint.checkpoint_path != Config().checkpoint.checkpoint_path, "a recipe keeps to its own files"
    assert cfg.batch.accum_steps(8, cfg.data.seq_len) >= 1
    cfg.model.validate_sizes()


@pytest.mark.parametrize("word, expected", [
    ("--cylinders=8", dict(cylinders=8)), ("--turbo=True", dict(turbo=True)), ("--no_turbo=True", dict(turbo=False)),
    ("--no-turbo=False", dict(turbo=True)), ("--idle_speed=None", dict(idle_speed=None)),
    ("--heated=None", dict(heated=None)), ("--stops=new_york", dict(stops=["new_york"])),
    ("--stops=['a b', 'c']", dict(stops=["a b", "c"])), ("--stops=[a", dict(stops=["[a"])),
    ("--stops=None", dict(stops=["None"])), ("--stops=7", dict(stops=["7"]))])
def test_values_as_a_sweep_writes_them(word, expected):
    assert expected.items() <= flatten(parse(Car, [word])).items()


def test_one_flag_has_one_owner():
    @dataclass
    class Twice:
        """Twice."""

        one: Engine = field(default_factory=Engine)
        two: Engine = field(default_factory=Engine)

    with pytest.raises(AssertionError, match="two groups declare"):
        parse(Twice, [])


def test_a_package_that_is_missing_is_named_with_what_installs_it(capsys):
    @one_line_errors()
    def main():
        import a_package_that_nobody_has  # noqa: F401

    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == ("error: the a_package_that_nobody_has package is missing: pip install "
                                       "a_package_that_nobody_has\n")


@pytest.mark.parametrize("words, answer", [
    ("warmdown_ratio warmdown_iters decay-ratio lr-decay-steps cooldown", "did you mean --decay-steps?"),
    ("tokens param-data-ratio", "did you mean --num-tokens?"), ("epochs", "did you mean --num-epochs?"),
    ("eval-only", "run python evaluate.py"), ("use-tensor-parallel tp fsdp", "shards the model over all ranks"),
    ("download-logs", "; after the run: python wandb_tools.py download RUN.pt"), ("moe n-experts", " (see --help)"),
    ("early-stop patience", ".best.pt"), ("bias=False", "--arch"),
    ("run-id wandb-id", "did you mean --wandb-run-id?"), ("entity", "--wandb-entity?"), ("tags", "--wandb-tags?"),
    ("name run-name wandb-name", "did you mean --wandb-run-name?"), ("wandb-resume", "did you mean --resume?"),
    ("z-loss ema", "docs/extending.md has it as a diff"),
    ("adam-eps momentum num-workers val-frequency hidden-dim", "(see --help)"), ("final-lr-frac", "--min-lr?"),
    ("optimizer.lr train.learning-rate", "did you mean --lr?"), ("eval.steps eval.step", "--eval-steps?"),
    ("train.max_tokens", "did you mean --num-tokens?"),
    ("train.max_steps training.steps", "did you mean --num-steps?"), ("validation.steps", "--eval-tokens?"),
    ("max-new-tokens", "it is python generate.py's"), ("train.global_batch_size", "counts it in tokens"),
    ("warmup", "--warmup-steps?"), ("wamup-steps", "--warmup-steps?"), ("trian_data", "--train-data?")])
def test_a_word_of_another_meaning_is_not_taken_for_a_typing_error(words, answer):
    for word in words.split():
        with pytest.raises(UserError) as caught:
            refuse_unknown(flag(word), [*map(flag, flag_fields(Config)), "--config", "--decay-steps"], "flag")
        assert str(caught.value).endswith(answer), caught.value


@pytest.mark.parametrize("argv, answer", [
    (["--arch", "bias"], "qwen3, nanochat"), (["--amp-dtype", "bfloat16"], "did you mean bf16?"),
    (["--lr-scheduler", "constant"], "did you mean none?"),
    (["--lr-scheduler", "constant_with_warmup"], "did you mean none?"),
    (["--compile", "--num-stesp", "5"], "flag --num-stesp is not known; did you mean --num-steps?"),
    (["--no-tie-embedding"], "did you mean --no-tie-embeddings?"), (["--fp32"], "did you mean --no-amp?"),
    (["--use-wandb", "--learning_rate=1"], "flag --learning_rate is not known; did you mean --lr?"),
    (["--compile", "a.py"], "give it as --config a.toml"),
    (["run.pt"], "argument run.pt: give it as --checkpoint-path run.pt"),
    (["--no-amp", "/"], "argument /: give it as --train-data /")], ids=str)
def test_a_value_is_answered_with_a_value_and_what_follows_a_switch_as_elsewhere(argv, answer):
    with pytest.raises(UserError) as caught:
        parse(Config, argv)
    assert str(caught.value).endswith(answer), caught.value


@pytest.mark.parametrize("argv", [["--compile=1"], ["--compile", "True"], ["--no_compile=yes"], ["--compile="],
                                  ["--batch-size", "1", "--compile", "1"]], ids=str)
def test_a_switch_with_a_value_is_refused_by_name(argv):
    with pytest.raises(UserError, match="^--(no-)?compile [^ ]+: a switch has no value; give --compile or --no-"):
        parse(Config, argv)


@pytest.mark.parametrize("word, answer", [("resume", "give --resume instead"), ("scratch", "leave it out")])
def test_the_words_of_nanogpts_init_from_are_answered(word, answer):
    with pytest.raises(UserError, match=f"--init-from {word}: .*{answer}"):
        parse(Config, [f"--init_from={word}"])


@pytest.mark.parametrize("toml, answer", [
    ("[metrics]\nenable_wandb = true", "section metrics is not known; did you mean wandb?"),
    ("fp32 = true", "key fp32 is not known; write amp = false"), ("no_amp = false", "write amp = true")])
def test_toml_of_another_trainer_is_answered_with_ours(tmp_path, toml, answer):
    (tmp_path / "c.toml").write_text(toml)
    with pytest.raises(UserError) as caught:
        parse(Config, ["--config", str(tmp_path / "c.toml")])
    assert str(caught.value).endswith(answer), caught.value


def test_the_flags_of_other_trainers_are_answered_with_ours():
    """Those of the table in docs/coming-from.md."""
    rows = [row.split("|")[1:-1] for row in (ROOT / "docs" / "coming-from.md").read_text().splitlines()
            if row.startswith("| `--")]
    assert len(rows) > 15
    for ours, *theirs in rows:
        meant = re.findall(r"`--(?:no-)?([\w-]+)`", ours)
        for name in re.findall(r"`(\w+)`", "|".join(theirs)):
            if flag(name)[2:] not in meant:  # else it is the same
                with pytest.raises(UserError, match=f"did you mean --({'|'.join(meant)})\\?"):
                    parse(Config, [f"--{name}", "1"])


@pytest.mark.parametrize("soft, hard, raised", [(256, 20_000, 10_240), (256, 512, 512), (20_000, 30_000, None),
                                                (256, resource.RLIM_INFINITY, 10_240)])
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch, soft, hard, raised):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    parse(Config, [])
    assert asked == ([(raised, hard)] if raised else [])


def test_more_files_may_be_validated_on_than_the_shell_allows(trainer):
    paths = [trainer.folder / f"{i}.txt" for i in range(70)]
    for path in paths:
        path.write_text("a king sings of the old river " * 4)
    args = trainer.arguments(["--num-steps", 1, "--val-data", *paths])
    run = subprocess.run(["sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", *args], cwd=trainer.folder, text=True,
                         capture_output=True, env=environment())
    assert run.returncode == 0 and "step 1/1" in run.stdout, run.stderr
