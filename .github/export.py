# SPDX-License-Identifier: MIT
"""Make a small file of a checkpoint, for extract.py, load_encoder and train.py --init:

    python .github/export.py runs/small/last.pt OUT.pt "what it was trained on"

It holds the target encoder in fp16, its config, the step and the settings of the run.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from train import load_checkpoint

if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    _, path, out, origin = sys.argv
    checkpoint = load_checkpoint(path)
    small = {name: checkpoint[name] for name in ("format", "step", "config", "settings")}
    small["origin"] = origin
    small["target_encoder"] = {
        name: tensor.half() for name, tensor in checkpoint["target_encoder"].items()
    }
    torch.save(small, out)
