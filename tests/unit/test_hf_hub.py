"""Names on the hub: fetched through the client's own cache and switches; a hub that breaks off is one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import checkpoints, hub

pytestmark = pytest.mark.process

# A process of its own, and a cold one: `huggingface_hub` reads its switches when it is imported.
PROGRAM = """
import json, sys, time, urllib.error, urllib.request
import megatron_mimo
from megatron_mimo import pretrained

built = []
class Counted(pretrained.MimoModel):
    def __init__(self, *arguments, **options):
        built.append(arguments)
        super().__init__(*arguments, **options)
pretrained.MimoModel = Counted

def end_hub(address):
    while True:
        try:
            urllib.request.urlopen(address).read()
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return
        except OSError:  # it was about to end
            pass
        time.sleep(0.1)

megatron_mimo.initialize()
for name in sys.argv[1:]:
    if name.startswith("http"):
        end_hub(name)
        continue
    built.clear()
    try:
        model = megatron_mimo.from_pretrained(name)
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error), len(built)]))
    else:
        total = model.language_model.embedding.word_embeddings.weight.double().sum().item()
        print(json.dumps([name, "loaded", total, len(built)]))
"""


def asked(home: Path, *names: str, **switches: str) -> list[list]:
    """What a process says of each name: what it is, or its error, and how many models were built."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", **switches}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_a_hub_that_breaks_off_builds_nothing_and_what_is_cached_serves_offline(tmp_path) -> None:
    repositories, home = tmp_path / "repositories", tmp_path / "home"
    whole = checkpoints.written(checkpoints.language_model("llama-2"), repositories / "owner" / "whole")
    checkpoints.written(checkpoints.language_model("qwen3"), repositories / "owner" / "cut")
    expected = load_file(whole / "model.safetensors")["model.embed_tokens.weight"].double().sum().item()
    later = ("owner/whole", "owner/cut", "owner/other")
    with hub.served(repositories) as server:
        server.cut.add("owner/cut/model.safetensors")
        names = ("owner/whole", "owner/none", "owner/cut", server.endpoint + hub.END, *later)
        loaded, none, cut, *gone = asked(home, *names, HF_ENDPOINT=server.endpoint)
    assert loaded[1:] == ["loaded", expected, 1]
    assert (home / "hub" / "models--owner--whole" / "snapshots" / hub.COMMIT / "model.safetensors").exists()
    assert (none[1], none[3]) == ("FileNotFoundError", 0)
    assert "owner/none: expected a directory, or a name on the hub" in none[2]
    assert (cut[1], cut[3]) == ("ConnectionError", 0), cut
    assert "owner/cut: fetching it from the hub broke off" in cut[2]
    # What is there whole still loads; what is not is one error, with a hub that does not answer and without asking.
    for found in (gone, asked(home, *later, HF_HUB_OFFLINE="1")):
        whole_again, half, other = found
        assert whole_again[1:] == ["loaded", expected, 1], whole_again
        assert (half[1], half[3]) == ("ConnectionError", 0), half
        assert (other[1], other[3]) == ("ConnectionError", 0)
        assert "owner/other: the hub cannot be reached or HF_HUB_OFFLINE is set" in other[2]
