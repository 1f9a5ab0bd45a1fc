"""Run one cell in the processes that torchrun starts.

    torchrun --standalone --nproc-per-node=8 -m structadapt.study.one_cell FOLDER --launcher PID

FOLDER is the cell's, with its cell.json. The processes end when the launcher does.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from structadapt.study import distributed, folders
from structadapt.study.runs import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--launcher", type=int, default=os.getpid(), help="ends when this one does")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cell = folders.cell_in(args.folder)

    def stop() -> bool:
        return (args.folder / distributed.STOP).exists() or not distributed.is_alive(args.launcher)

    with distributed.group(cell):
        try:
            run(cell, args.folder, stop=stop, save=not args.no_save)
        except distributed.StoppedError:  # no failure, or torchrun would call it one
            (args.folder / distributed.STOP).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
