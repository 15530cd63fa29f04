"""What W&B's errors mean, and what a user can do about them."""

import io
import re

from mini_llm.errors import visible


def reason(error):
    """The first line of an error message, without the server's response."""
    lines = str(error).splitlines() or [""]
    if "validation error" in lines[0] and len(lines) > 2:  # a setting; its value may be a secret
        lines = [re.sub(r"\[type=.*", "", f"WANDB_{lines[1].strip().upper()}: {lines[2].strip()}")]
    return visible(re.sub(r":? *\{.*", "", lines[0])[:200]).strip() or type(error).__name__


ADVICE = [  # (pattern in W&B's error message, what to do)
    # First: "404 rows" has no code of an answer.
    (r"cannot be read back", "in a few minutes, repeat this: it sends what is lacking then"),
    (r"package is missing", "pip install wandb"),
    (r"^WANDB_", "correct or unset that variable"),
    (r"api[ _]key|\blogin\b|\b401\b|authenticat|logged in|no-tty", "wandb login, or WANDB_API_KEY"),
    (r"no space left|\[errno 2\]|read-only|not a directory|file exists|\[errno 13\]|disk quota",
     "name a folder of your own with room: --wandb-dir"),
    (r"\b(409|410)\b|previously created and deleted", "an id is given once: --wandb-run-id NEW, with --resume or "
     "wandb_tools.py sync RUN"),
    (r"could not find sweep|invalid path", "give ENTITY/PROJECT/ID (of a sweep, `python sweep.py create` prints it)"),
    (r"could not find run", "give ENTITY/PROJECT/ID (or WANDB_ENTITY, WANDB_PROJECT); of a sweep PROJECT/sweeps/ID"),
    (r"\b(403|404)\b|permission|not found|could not find|\bentity\b",
     "check --wandb-entity and --wandb-project (WANDB_ENTITY, WANDB_PROJECT), or the key's rights"),
    (r"cannot query field|unknown (field|argument)", "this server is older than the wandb package: update either"),
    (r"\b429\b|rate limit|quota|storage", "W&B limits this account: fewer reports (--log-steps), or wait"),
    (r"", "check the network and WANDB_BASE_URL, or train with --wandb-mode offline"),
]


def advice(error):
    """What the user can do about a W&B error."""
    return next(words for pattern, words in ADVICE if re.search(pattern, str(error), re.IGNORECASE))


def with_advice(error):
    """The message of a W&B error, and what the user can do about it, unless the message already says so."""
    why = reason(error).rstrip(".")
    remedy = advice(f"{why} {error}")
    return why if remedy.split(",")[0] in why else f"{why}; {remedy}"


class Relay(io.TextIOBase):
    """Replaces stderr: relays each of the SDK's warnings and errors once, ten at most, and drops everything else."""

    # Not worth telling, or told better by Delivery.
    KNOWN = re.compile("is experimental|already exists with the same content|Fatal error while uploading")

    def __init__(self, say):
        self.say, self.told, self.buffer = say, set(), ""

    def write(self, text):
        *lines, self.buffer = (self.buffer + text).split("\n")
        for line in lines:
            found = re.match(r"wandb: (WARNING|ERROR) (.*)", re.sub(r"\x1b\[[0-9;]*m", "", line))
            if found and found[2] not in self.told and len(self.told) < 10 and not self.KNOWN.search(found[2]):
                self.told.add(found[2])
                self.say("WARNING", found[2])
        return len(text)
