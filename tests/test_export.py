import subprocess
import sys

import torch
from conftest import ROOT, environment

from export import load_model


def test_the_command_writes_a_folder_that_transformers_loads_with_equal_logits(trainer, text):
    run = trainer("--num-steps", 4, checkpoint="lr-0.5.pt")
    command = [sys.executable, str(ROOT / "export.py"), "--checkpoint-path", "lr-0.5.best.pt", "--output", "folder"]
    first, again = (subprocess.run(command, cwd=trainer.folder, capture_output=True, text=True, env=environment())
                    for _ in range(2))
    assert run.code == first.returncode == 0, run.err + first.stderr
    assert again.returncode == 2 and "--overwrite" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(trainer.folder / "folder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trainer.folder / "folder")
    ours, _ = load_model(trainer.folder / "lr-0.5.best.pt")
    x = torch.tensor([tokenizer(text.read_text()[:60])["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, atol=1e-4)
