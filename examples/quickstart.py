"""From raw text to a filled mask in minutes, with the real commands, which also work on your own text."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/quickstart")
EXPORTED = Path("exported/quickstart")
COMMANDS = [
    "preprocess train-tokenizer --input examples/corpus --vocab_size 8192 --output data/quickstart/tokenizer",
    "preprocess shard --input examples/corpus --tokenizer data/quickstart/tokenizer --output data/quickstart/corpus "
    "--validation_fraction 0.05",
    "deepspeed launch/pretrain.py --recipe fast --model nano --data_dir data/quickstart/corpus "
    f"--output_dir {RUN} --max_minutes 3.5 --eval_interval 250",
    f"python launch/export_hf.py --checkpoint {RUN} --output {EXPORTED}",
]
SENTENCES = [
    "She put her hand <mask> the table.",
    "He did not <mask> what to say.",
    "I have never <mask> such a thing in my life.",
    "The two boys ran out <mask> the garden.",
    "They could not help <mask> at each other.",
]


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(ROOT / RUN, ignore_errors=True)  # a second quickstart must not resume the first
    for number, command in enumerate(COMMANDS, 1):
        print(f"\n[{number}/{len(COMMANDS)}] {command}", flush=True)
        arguments = shlex.split(command)
        if arguments[0] == "python":
            arguments[0] = sys.executable
        if (code := subprocess.run(arguments, cwd=ROOT, check=False).returncode) != 0:
            sys.exit(f"that command failed with exit code {code}")
    rows = [json.loads(line) for line in (ROOT / RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    before, after = evaluations[0], evaluations[-1]
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(
        f"held-out perplexity  before {before['eval_perplexity']:,.0f}  after {after['eval_perplexity']:,.0f}"
        f"  (loss {before['eval_loss']:.2f} -> {after['eval_loss']:.2f} nats)"
    )
    print(
        f"what it learned      its loss is {before['unigram_loss'] - after['eval_loss']:.2f} nats below that of token "
        f"frequencies ({before['unigram_loss']:.2f}); counts of neighbouring words reach {before['neighbour_loss']:.2f}"
    )
    fill_masks()
    print(f"exported model       {EXPORTED}  (AutoModelForMaskedLM.from_pretrained({str(EXPORTED)!r}))")
    print("what ran             for your own text, replace examples/corpus with your folder or file")
    for command in COMMANDS:
        print(f"    {command}")


def fill_masks() -> None:
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fill_mask = pipeline("fill-mask", model=str(ROOT / EXPORTED))
    for sentence in SENTENCES:
        guesses = ", ".join(f"{guess['token_str'].strip()} ({guess['score']:.0%})" for guess in fill_mask(sentence)[:3])
        print(f"filled mask          {sentence}  ->  {guesses}")


if __name__ == "__main__":
    main()
