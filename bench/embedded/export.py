"""Write a trained run as a checkpoint: ``python -m bench.embedded.export RUN_DIR [OUT]``.

bfloat16 safetensors with LLaDA's tensor names, ``config.json``, ``tokenizer.json`` and ``tokenizer_config.json`` with
the chat template. The model card is written by hand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import ROOT

from .train import RECIPES, Run
from .vocabulary import BOS, CHAT_TEMPLATE, EOS, MASK

DEFAULT = ROOT / "sfs_triton" / "embedded"


def export(run: Run, out: Path) -> None:
    """Write the checkpoint files: all of them beside the old ones first, then each in its place."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in run.model.state_dict().items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": run.config["max_sequence_length"],
    }

    partials: list[Path] = []

    def write(name: str, save) -> None:
        partial = out / (name + ".partial")
        save(partial)
        partial.chmod(0o644)
        partials.append(partial)

    write("model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write("config.json", lambda path: path.write_text(json.dumps(run.config, indent=2) + "\n"))
    write("tokenizer.json", lambda path: path.write_text(run.tokenizer.to_str(pretty=False)))
    write("tokenizer_config.json", lambda path: path.write_text(json.dumps(tokenizer_config, indent=2) + "\n"))
    for partial in partials:
        os.replace(partial, partial.with_suffix(""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="cpu", help="that the run was trained with")
    arguments = parser.parse_args()
    run = Run(arguments.run, RECIPES[arguments.recipe])
    run.resume()
    if run.step == 0:
        raise SystemExit(f"error: {arguments.run} holds no state.pt of a trained run")
    export(run, arguments.out)
    print(f"step {run.step}, {run.tokens / 1e6:.1f} M tokens, written to {arguments.out}")


if __name__ == "__main__":
    main()
