"""One of the processes that train together, for test_distributed.py: `growth train`, told in JSON, once or more.

torchrun ... tests/train_ranks.py '[{"model": .., "data": .., "out": .., "steps": 8, "killed": [1, 5]}]'

killed: the process, and the step after which a power cut takes it.
"""

import json
import os
import signal
import sys

import torch

import growth
from growth import __main__ as cli
from growth.training import progress


def train(killed: list[int] | None = None, **settings) -> None:
    def step(self, now):
        if killed == [int(os.environ.get("RANK", 0)), now]:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.RunProgress.step = step
    cli.say(str(growth.train(**settings)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.app = lambda *_, **__: [train(**settings) for settings in json.loads(sys.argv[1])]
    cli.main()
