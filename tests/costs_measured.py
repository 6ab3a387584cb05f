"""A process that trains, or grows, and tells the most bytes that it held for that: for test_costs.py.

python tests/costs_measured.py train MODEL              steps of B x T by AdamW; with layers computed again
python tests/costs_measured.py grow SRC WARM DST WIDTH  WARM is a small one, grown first

What is imported on the way, and what torch keeps for itself, is there before: each does a little of it first.
"""

import sys
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import growth
from benchmarks.measure import LIBC, M_MMAP_THRESHOLD, attempt
from growth.loading import quiet

B, T = 2, 256


def steps(config: LlamaConfig, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    model.config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (B, T))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def main(verb: str, *given: str) -> None:
    torch.set_num_threads(1)
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**16)  # tensors that are freed leave: what is resident is what lives
    with quiet():
        if verb == "train":
            config = LlamaConfig.from_pretrained(given[0])
            sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
            small = LlamaConfig(**config.to_dict() | sizes | {"head_dim": 2})
            for checkpointing in (False, True):
                steps(small, checkpointing)
                print(attempt(partial(steps, config, checkpointing)).mb)
        else:
            src, warm, dst, width = given
            growth.grow(warm, f"{dst}-warm", hidden_size=96)
            growth.grow(src, dry_run=True, hidden_size=int(width))
            print(attempt(lambda: growth.grow(src, dst, hidden_size=int(width))).mb)


if __name__ == "__main__":
    main(*sys.argv[1:])
