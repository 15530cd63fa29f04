"""Dataclass fields that are command-line flags, help texts and TOML keys at once.

A module declares its settings in a dataclass of `arg(...)` fields. A program composes such dataclasses into one, and
`parse` fills it: defaults, then each `--config FILE.toml`, then flags. An unknown name is refused, with a suggestion.
"""

import argparse
import ast
import atexit
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import operator
import os
import shlex
import sys
import tomllib
import types
import typing
from pathlib import Path

from mini_llm.errors import UserError
from mini_llm.processes import allow_many_files
from mini_llm.suggestions import ELSEWHERE, advice, nearest, plain

# How a process is launched and where it writes, not what it trains; W&B's flags, wandb_…, are such flags, too.
LAUNCH_FLAGS = {"resume", "overwrite", "dry_run", "checkpoint_path", "cache_dir", "heartbeat_file"}
RUN_CONFIG = ".config.toml"  # a run keeps its flags under its checkpoint's name with this suffix
BOUNDS = {"gt": (operator.gt, "greater than"), "ge": (operator.ge, "at least"),
          "lt": (operator.lt, "less than"), "le": (operator.le, "at most")}


def arg(default, help, *, choices=(), const=None, metavar=None, empty=True, **bounds):
    """A dataclass field that is also a flag. `bounds`: any of gt, ge, lt, le. `const`: the value of a flag given alone
    (`--resume`). `empty=False`: reject an empty string, which an unset shell variable gives."""
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = dict(help=help, choices=choices, const=const, metavar=metavar, empty=empty, bounds=bounds)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    return "--" + name.replace("_", "-")


def parse(cls, argv=None):
    """Fill `cls`, a dataclass of dataclasses, from `argv` (default: sys.argv) and the TOML files that it names. Raises
    UserError for anything unknown, of the wrong type, out of bounds, or rejected by a `validate()`."""
    allow_many_files()
    fields = flag_fields(cls)
    parser = Parser(prog=Path(sys.argv[0]).name, usage="%(prog)s [--config FILE.toml] [flags]",  # not all of them twice
                    description=cls.__doc__, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118))
    parser.add_argument("--config", metavar="FILE.toml", action="append", default=[],
                        help="defaults for the flags below, which override it; may be given again: later ones win")
    for group in dataclasses.fields(cls):
        section = parser.add_argument_group(group.type.__doc__.strip().splitlines()[0].rstrip("."))
        for declared in fields.values():
            if declared.group == group.name:
                _add_flag(section, declared)

    argv = [part for word in (sys.argv[1:] if argv is None else argv) for part in _plain_flags(word, fields)]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_word(unknown[0], argv, fields)

    given, values = vars(given), {}
    for path in given.pop("config"):
        found = _read_toml(path, cls, fields)
        if path.endswith(RUN_CONFIG) and "checkpoint_path" in fields:  # the run's, wherever that has been moved
            found.setdefault("checkpoint_path", path.removesuffix(RUN_CONFIG) + ".pt")
        override(values, found, cls, f"--config {path}: ")
    override(values, {name: coerce(flag(name), fields[name], value) for name, value in given.items()}, cls)

    groups = {group.name: part_of(group.type, values) for group in dataclasses.fields(cls)}
    config = cls(**groups)
    config.given = frozenset(values)  # set explicitly, rather than left at their defaults
    for part in [*groups.values(), config]:
        if hasattr(part, "validate"):
            part.validate()
    return config


def override(values, later, cls, where=""):
    """Updates `values` with those of a later source. Of a group's ALTERNATIVES, which set the same thing in different
    units, the one that it gives replaces the others. Raises UserError if it gives several."""
    for group in dataclasses.fields(cls):
        names = getattr(group.type, "ALTERNATIVES", ())
        chosen = [name for name in names if later.get(name)]
        if len(chosen) > 1:
            raise UserError(f"{where}{' and '.join(map(flag, chosen))}: one decides the other; give one of them")
        for name in names if chosen else ():
            values.pop(name, None)
    values |= later


class Declared(typing.NamedTuple):
    """A flag as a dataclass declares it. `group`: the name of this dataclass in the composed one."""

    group: str
    field: dataclasses.Field
    kind: type

    @property
    def default(self):
        return self.field.default if self.field.default is not dataclasses.MISSING else self.field.default_factory()

    @property
    def base(self):
        """int | None → int; list[str] → str."""
        kind = self.kind
        if isinstance(kind, types.UnionType):
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def flag_fields(cls):
    """name → Declared, for every flag of `cls`."""
    found = {}
    for group in dataclasses.fields(cls):
        hints = typing.get_type_hints(group.type)
        for field in dataclasses.fields(group.type):
            assert field.name not in found, f"two groups declare {field.name}"
            found[field.name] = Declared(group.name, field, hints[field.name])
    return found


def flatten(config):
    """A filled dataclass of dataclasses as one flat dict: what is logged, tracked and saved."""
    return {name: value for group in dataclasses.fields(config)
            for name, value in vars(getattr(config, group.name)).items()}


def is_launch_flag(name):
    """Whether a flag may differ between two starts of one run, or between runs that train the same."""
    return name in LAUNCH_FLAGS or name.startswith("wandb_")


def part_of(cls, flat):
    """A dataclass of flags from a flat dict that may have more of them or fewer, such as a checkpoint's `config`."""
    return cls(**{field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat})


def to_toml(config, without=()):
    """A filled dataclass of dataclasses as TOML for `--config`, omitting unset values and the names in `without`."""
    lines, fields = [], flag_fields(type(config))
    for group in dataclasses.fields(config):
        values = {name: value for name, value in vars(getattr(config, group.name)).items()
                  if name not in without and value is not None and (value != "" or fields[name].default)}
        # JSON strings, numbers, booleans and lists are valid TOML, except for one character that TOML requires escaped.
        lines += [f"[{group.name}]", *(f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
                                       for name, value in values.items()), ""]
    return "\n".join(lines)


def switched_on(variable):
    """Whether an environment variable says yes, in one of the ways that the Hugging Face Hub and W&B take for it."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def positive(text):
    """An argparse type: a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """The parser of every command: errors are one line, and output to a closed stdout or stderr is dropped."""

    def __init__(self, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, **options)
        # Saves the last collection, of half a second with torch. The price: objects in cycles are not finalized.
        atexit.register(gc.freeze)
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process ends

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def _add_flag(section, declared):
    name, meta, default, base = declared.field.name, declared.field.metadata, declared.default, declared.base
    shown = "" if default in (None, "", [], False) else f" (default: {default})"
    options = dict(dest=name, default=argparse.SUPPRESS, help=(meta["help"] + shown).replace("%", "%%"))
    if base is bool:
        section.add_argument(flag(name), action=argparse.BooleanOptionalAction, **options)
        return
    options["metavar"] = meta["metavar"] or ("|".join(meta["choices"]) if meta["choices"] else
                                             {int: "N", float: "X"}.get(base, "TEXT"))
    if typing.get_origin(declared.kind) is list:
        options |= dict(nargs="+", action="extend")
    elif meta["const"] is not None:
        options |= dict(nargs="?", const=meta["const"])
    section.add_argument(flag(name), **options)


def _is_switch(name, fields):
    """Whether `name` is that of a flag without a value, which --no- turns off."""
    return name in fields and fields[name].base is bool


def coerce(label, declared, value):
    """Convert a command-line string or a TOML value to the type that the field declares, checking its bounds."""
    example = "" if declared.default in (None, "", []) else f", such as the default, {declared.default}"
    base, meta = declared.base, declared.field.metadata
    if typing.get_origin(declared.kind) is list:
        single = declared._replace(kind=base)
        return [coerce(label, single, item) for item in (value if isinstance(value, list) else [value])]
    if base in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, float)):
        try:
            number = base(value)
            usable = math.isfinite(number) and (base is float or abs(number) < 2**63)
        except (ValueError, OverflowError):
            usable = False
        if not usable or (base is int and isinstance(value, float)):
            kinds = {int: "a whole number", float: "a finite number"}
            raise UserError(f"{label} {value}: expected {kinds[base]}{example}")
        for bound, limit in meta["bounds"].items():
            holds, words = BOUNDS[bound]
            if not holds(number, limit):
                raise UserError(f"{label} {value}: must be {words} {limit}{example}")
        return number
    if not isinstance(value, base) or (isinstance(value, bool) and base is not bool):
        raise UserError(f"{label} {value!r}: expected {base.__name__}{example}")
    if base is str and ("\0" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        # Neither a file nor its name can contain this: the first write would fail.
        raise UserError(f"{label} {value!r}: not UTF-8 text, or it contains a NUL")
    if value == "" and not meta["empty"]:
        raise UserError(f"{label} '': is empty; name a file, or leave it out")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{label} {value}: not one of {', '.join(meta['choices'])}{nearest(value, meta['choices'])}")
    return value


def _read_toml(path, cls, fields):
    if os.path.exists(path) and not os.path.isfile(path):  # only one rank could read a pipe
        raise UserError(f"--config {path}: is not a file")
    try:
        return _toml_values(path, tomllib.loads(Path(path).read_text("utf-8-sig")), cls, fields)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers with too many digits raise ValueError, too
        hints = {".py": "; write it as TOML, as in configs/", ".yaml": "; a sweep: python sweep.py create"}
        raise UserError(f"--config {path}: not valid TOML: {error}{hints.get(Path(path).suffix, '')}") from None


def _toml_values(path, table, cls, fields):
    sections = [group.name for group in dataclasses.fields(cls)]
    flat = []
    for key, value in table.items():
        if isinstance(value, dict):
            if key not in sections:
                refuse_unknown(key, sections, f"--config {path}: section", f"; there are {', '.join(sections)}")
            flat += value.items()
        else:
            flat.append((key, value))
    values = {}
    for key, value in flat:
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"--config {path}: {key} is there twice; leave one out")
        if name not in fields:
            meant = ELSEWHERE.get(name, name)
            if _is_switch(on := meant.removeprefix("no_"), fields) and on != meant:
                raise UserError(f"--config {path}: key {key} is not known; write {on} = {str(value is False).lower()}")
            refuse_unknown(key, list(fields), f"--config {path}: key")
        values[name] = coerce(f"--config {path}: {key} =", fields[name], value)
    return values


def refuse_unknown(word, known, what, otherwise=" (see --help)"):
    """Raises UserError, with the name among `known` that is most like `word`, if there is one."""
    word = word.split("=")[0]
    raise UserError(f"{what} {word} is not known{advice(word, known) or otherwise}")


def _refuse_word(word, argv, fields):
    """Raises UserError for a word of the command line that is no flag, nor the value of one."""
    known = [*map(flag, fields), *(flag("no_" + name) for name in fields if _is_switch(name, fields)), "--config"]
    if word.startswith("-"):
        refuse_unknown(word, known, "flag")
    if word.endswith((".toml", ".py")):  # nanoGPT's way
        written = "write it as TOML, as in configs/, and " if word.endswith(".py") else ""
        raise UserError(f"argument {word}: {written}give it as --config {os.path.splitext(word)[0]}.toml")
    for name, fits in dict(checkpoint_path=word.endswith(".pt"), train_data=os.path.exists(word)).items():
        if fits and name in fields:
            raise UserError(f"argument {word}: give it as {flag(name)} {shlex.quote(word)}")
    for before, value in itertools.pairwise(argv):
        if value == word:
            _refuse_value(before, word, fields)
    refuse_unknown(word, known, "argument")


def _refuse_value(word, value, fields):
    """Raises UserError if `word` is a switch, which the Hugging Face Trainer gives a value."""
    name = plain(word).removeprefix("no_")
    if word.startswith("--") and _is_switch(name, fields):
        raise UserError(f"{word} {value or repr(value)}: a switch has no value; give {flag(name)} or "
                        f"{flag('no_' + name)} alone")


def _plain_flags(word, fields):
    """--batch_size=4 → --batch-size=4 and, for values as a sweep writes them, --compile=False → --no-compile,
    --train-data=['a', 'b'] → --train-data a b, --eval-steps=None → nothing. Other values are unchanged."""
    if not word.startswith("--"):
        return [word]
    given, equals, value = word[2:].partition("=")
    given = given.replace("-", "_")
    name = given.removeprefix("no_")
    kind = fields[name].kind if name in fields else None
    if _is_switch(name, fields) and value.lower() in ("true", "false"):
        on = (value.lower() == "true") is (given == name)
        return [flag(name if on else "no_" + name)]
    if value == "None" and type(None) in typing.get_args(kind):
        return []
    if equals:
        _refuse_value(flag(given), value, fields)
    if typing.get_origin(kind) is list and value.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            return [flag(given), *map(str, ast.literal_eval(value))]
    return [flag(given) + equals + value if kind else word]  # an unknown one as it was typed, for the error
