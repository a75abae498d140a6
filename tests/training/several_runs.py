"""A program several times in one process (or one group of processes), which saves starting Python and torch again.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 \\
        python tests/training/several_runs.py bevt_fast/train.py A.json=PORT B.json=PORT

The processes leave their group after a run and meet at another port for the next. `--resume auto` throughout: where the
output is new, that begins. Pretraining ends with its last checkpoint, without scores and pictures.
"""

import os
import sys
from pathlib import Path

from bevt_fast.training.run import Run
from tests.training.command import train_here

if __name__ == "__main__":
    Run.finish = lambda self: self.save(self.last_step)
    for argument in sys.argv[2:]:
        config, _, os.environ["MASTER_PORT"] = argument.partition("=")
        code = train_here("--config", config, "--resume", "auto", program=Path(sys.argv[1]))
        if code:
            sys.exit(code)
