"""Sharded training (FSDP2): every process has a part of each weight, gradient and state.

Starts two processes on the CPU; ``torchrun --nproc-per-node 4 examples/fsdp.py`` starts as many
as wanted, on GPUs if there are any. The checkpoint can be loaded by another number of processes.
"""
# Reaches: accuracy 0.93

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import Digits, accuracy, network
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from wsam_fused import WSAM


def train(rank: int, ranks: int, folder: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks,))
    torch.manual_seed(0)
    digits = Digits()
    model = network().to(device)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.9, lr=5e-3)

    for x, y in digits.batches(epochs=8):
        # Every process takes its share of the batch; the gradients are averaged.
        x, y = (part.tensor_split(ranks)[rank].to(device) for part in (x, y))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    weights, states = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "states": states}, checkpoint_id=folder)
    dcp.load({"weights": weights, "states": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)

    digits.test_x, digits.test_y = digits.test_x.to(device), digits.test_y.to(device)
    reached = accuracy(model, digits)
    if rank == 0:
        print(f"accuracy: {reached:.3f}")


def start(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    torch.set_num_threads(1)
    train(rank, ranks, f"{folder}/checkpoint")
    dist.barrier()
    # Not by Python's own end, which gloo's threads do not always survive (torch 2.13).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has set it, and where the others are
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        train(rank, ranks, "checkpoint")
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(start, args=(2, folder), nprocs=2)
