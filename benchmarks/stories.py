"""Stories in the style that a small decoder knows, drawn from the decoder itself: prompts and what follows, as JSONL.

TinyStories is not at hand on every machine. A decoder trained on it writes such text when sampled at temperature 1;
stories of other seeds are held-out text for exits and policy. Every story begins in its own way.

    python benchmarks/stories.py MODEL_FOLDER OUT_FOLDER [--train 2400 --dev 200 --test 300 --seed 0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT_WORDS, LEAST_WORDS, TOKENS, BATCH = 16, 12, 120, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    for name, count in (("train", 2400), ("dev", 200), ("test", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given.seed)
    seen: set[str] = set()
    for split in ("test", "dev", "train"):
        rows: list[dict[str, str]] = []
        while len(rows) < getattr(given, split):
            start = torch.full((BATCH, 1), tokenizer.bos_token_id)
            drawn = model.generate(start, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=0)
            for row in drawn.tolist():
                text = [token for token in row[1:] if token not in (tokenizer.eos_token_id, 0)]
                words = tokenizer.decode(text).strip().split(" ")[:-1]  # the last may be cut
                prompt = " ".join(words[:PROMPT_WORDS])
                if len(words) >= PROMPT_WORDS + LEAST_WORDS and prompt not in seen:
                    seen.add(prompt)
                    rows.append({"prompt": prompt, "response": " " + " ".join(words[PROMPT_WORDS:])})
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[: getattr(given, split)]]
        (given.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(lines)} stories")


if __name__ == "__main__":
    main()
