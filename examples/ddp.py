"""Data-parallel: every process perturbs by the gradient of its own part of the batch (m-sharpness).

Starts two processes on the CPU; under torchrun it is one of those that torchrun has started:
    torchrun --nproc-per-node 4 examples/ddp.py
"""
# Reaches: accuracy 0.93

import gc
import os
import tempfile

import torch
import torch.distributed as dist
from digits import Digits, accuracy, network
from torch.nn.parallel import DistributedDataParallel

from wsam_fused import WSAM


def train(rank: int, ranks: int) -> None:
    torch.manual_seed(0)  # the same batches everywhere, of which each process takes its part
    digits = Digits()
    model = DistributedDataParallel(network())
    optimizer = WSAM(
        model.parameters(),
        torch.optim.AdamW,
        rho=0.05,
        gamma=0.9,
        lr=5e-3,
        model=model,
        perturb_scope="local",
    )
    for whole_x, whole_y in digits.batches(epochs=8):
        x, y = whole_x.tensor_split(ranks)[rank], whole_y.tensor_split(ranks)[rank]

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    if rank == 0:
        print(f"accuracy: {accuracy(model, digits):.3f}")


def start(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    train(rank, ranks)
    gc.collect()  # a model that is left over would keep the group's threads until Python has ended
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        start(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:
        with tempfile.TemporaryDirectory() as folder:
            store = f"file://{folder}/store"
            torch.multiprocessing.spawn(start, args=(2, store), nprocs=2)
