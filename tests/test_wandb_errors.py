import pytest

from mini_llm.wandb_errors import Relay, advice, reason, with_advice


@pytest.mark.parametrize("message, words", [
    ("the wandb package is missing", "pip install wandb"), ("WANDB_BASE_URL: not a URL", "correct or unset"),
    ("api_key not configured (no-tty)", "wandb login"), ("HTTP 401: unauthorized", "wandb login"),
    ("this API key is of another host", "wandb login"), ("not logged in", "wandb login"),
    ("[Errno 28] No space left on device: '/w'", "name a folder"), ("[Errno 2] No such file: '/w'", "name a folder"),
    ("[Errno 13] Permission denied: '/w'", "name a folder"), ("[Errno 122] Disk quota exceeded", "name a folder"),
    ("[Errno 30] Read-only file system: '/w'", "name a folder"), ("[Errno 20] Not a directory: '/w'", "name a folder"),
    ("[Errno 17] File exists: '/w'", "name a folder"), ("HTTP 409: Conflict", "an id is given once"),
    ("run x was previously created and deleted", "an id is given once"), ("HTTP 410: Gone", "an id is given once"),
    ("Could not find run <Run me/p/x (not found)>", "give ENTITY/PROJECT/ID (or WANDB_ENTITY"),
    ("Could not find sweep x", "give ENTITY/PROJECT/ID (of a sweep, `python sweep.py create` prints it)"),
    ("HTTP 403: Forbidden", "check --wandb-entity"), ("HTTP 404", "check --wandb-entity"),
    ("permission denied to write to me/p", "check --wandb-entity"), ("entity me is unknown", "check --wandb-entity"),
    ("project not found", "check --wandb-entity"), ("Could not find project p", "check --wandb-entity"),
    ("404 of 404 rows cannot be read back from e/p/x", "in a few minutes"), ("unknown field x", "this server is older"),
    ("Cannot query field x on type Run", "this server is older"), ("Unknown argument x", "this server is older"),
    ("HTTP 429: Too Many Requests", "W&B limits"), ("filestream: rate limit exceeded", "W&B limits"),
    ("storage is used up", "W&B limits"), ("quota of this team is used up", "W&B limits"),
    ("connection refused at port 4010", "check the network"), ("timed out", "check the network")])
def test_an_error_comes_with_what_to_do(message, words):
    assert advice(message).startswith(words)
    assert with_advice(RuntimeError(f"{message}.")) == f"{message}; {advice(message)}"


def test_a_reason_is_a_line_without_the_servers_response():
    assert reason(RuntimeError('HTTP 400: {"errors": ["a", "b"]}\nand more')) == "HTTP 400"
    assert reason(RuntimeError("x" * 999)) == "x" * 200 and reason(TimeoutError()) == "TimeoutError"
    assert with_advice(RuntimeError('failed: {"code": 429}')).startswith("failed; W&B limits"), "which counts, too"
    assert reason(RuntimeError("1 validation error for Settings")) == "1 validation error for Settings"
    assert reason(RuntimeError("\x1b]0;x\x07")) == "\\x1b]0;x\\x07", "what the server says does not act on the terminal"


def test_a_wrong_setting_of_wandb_is_named():
    error = RuntimeError("1 validation error for Settings\nbase_url\n  Input should be a valid URL [type=url_parsing, "
                         "input_value='secret', input_type=str]")
    assert with_advice(error) == "WANDB_BASE_URL: Input should be a valid URL; correct or unset that variable"


def test_advice_is_given_once():
    missing = "the wandb package is missing: pip install wandb"
    assert with_advice(RuntimeError(missing)) == missing


def test_of_what_the_sdk_says_warnings_are_told_once_and_ten_at_most():
    told = []
    relay = Relay(lambda level, text: told.append((level, text)))
    relay.write("wandb: \x1b[33mWARNING\x1b[0m the disk is ")
    assert not told, "the line has not ended"
    relay.write("slow\nwandb: Currently logged in as: me\nTraceback: wandb: ERROR x\nwandb: ERROR gone\n")
    relay.write("wandb: WARNING the disk is slow\nwandb: WARNING shared mode is experimental\n"
                "wandb: ERROR Fatal error while uploading data\nwandb: ERROR x already exists with the same content\n")
    assert told == [("WARNING", "the disk is slow"), ("WARNING", "gone")]
    more = "".join(f"wandb: ERROR number {i}\n" for i in range(20))
    assert relay.write(more) == len(more)
    assert told[-1] == ("WARNING", "number 7") and len(told) == 10
