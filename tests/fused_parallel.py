"""Run by torchrun on two ranks: fused functions, split, against the same on one rank. Prints `ok NAME dB`."""

from __future__ import annotations

import sys

from fused_cases import EPS, linear, parameter, random, setup, sqnr
from kernel_cases import torch

from megatron_fp8_ext.fused.linear import cast_linear, norm_linear
from megatron_fp8_ext.fused.mlp import Block, mlp
from megatron_fp8_ext.fused.parallel import Parallel

FORMAT = "power_of_two"
M, H, F, N = 256, 256, 256, 384


def check(name, got, want):
    quality = sqnr(got.detach(), want.detach())
    assert got.shape == want.shape and quality > 40, f"{name}: {tuple(got.shape)}, {quality:.1f} dB"
    if torch.distributed.get_rank() == 0:
        print(f"ok {name} {quality:.1f}", flush=True)


def main(sequence: bool) -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    how = setup(FORMAT, Parallel(group, sequence))

    def tokens(x):
        """What a rank has of activations between the blocks."""
        return x.chunk(2)[rank].contiguous() if sequence else x

    def whole_gradient(grad, is_parameter):
        """A gradient over all tokens; under sequence parallelism Megatron sums the norms' itself."""
        if is_parameter and sequence:
            torch.distributed.all_reduce(grad)
        return grad

    x, gain = random(M, 1, H, seed=1), 1 + random(H, scale=0.1, seed=2)
    qkv, bias = parameter(N, H, seed=3), parameter(N, scale=0.5, seed=4)
    proj = parameter(H, F, seed=5)
    w1, w2 = parameter(2 * F, H, seed=6), parameter(H, F, seed=7)

    def leaf(value):
        return value.detach().clone().requires_grad_()

    def shard(weight, dim):
        return torch.nn.Parameter(weight.detach().chunk(2, dim)[rank].contiguous())

    # norm + linear, column-parallel
    dy = random(M, 1, N, scale=1e-3, seed=8)
    inputs = leaf(x), leaf(gain), qkv, bias
    y = norm_linear(*inputs[:2], EPS, linear(qkv, FORMAT), bias, setup(FORMAT))
    want = torch.autograd.grad(y, inputs, dy)
    mine = leaf(tokens(x)), leaf(gain), shard(qkv, 0), shard(bias, 0)
    got_y = norm_linear(*mine[:2], EPS, linear(mine[2], FORMAT), mine[3], how)
    check("qkv output", got_y, y.chunk(2, -1)[rank])
    got = torch.autograd.grad(got_y, mine, dy.chunk(2, -1)[rank].contiguous())
    check("qkv x", got[0], tokens(want[0]))
    check("qkv gain", whole_gradient(got[1].float(), True), want[1].float())
    check("qkv weight", got[2], want[2].chunk(2)[rank])
    check("qkv bias", got[3], want[3].chunk(2)[rank])

    # linear, row-parallel
    z, dy = random(M, 1, F, seed=9), random(M, 1, H, scale=1e-3, seed=10)
    inputs = leaf(z), proj
    y = cast_linear(inputs[0], linear(proj, FORMAT), setup(FORMAT))
    want = torch.autograd.grad(y, inputs, dy)
    mine = leaf(z.chunk(2, -1)[rank].contiguous()), shard(proj, 1)
    got_y = cast_linear(mine[0], linear(mine[1], FORMAT), how)
    check("proj output", got_y, tokens(y))
    got = torch.autograd.grad(got_y, mine, tokens(dy))
    check("proj x", got[0], want[0].chunk(2, -1)[rank])
    check("proj weight", got[1], want[1].chunk(2, 1)[rank])

    # the whole MLP; a rank holds the same part of gate and up
    inputs = leaf(x), leaf(gain), w1, w2
    y = mlp(*inputs[:2], Block(linear(w1, FORMAT), linear(w2, FORMAT), EPS, setup(FORMAT)))
    want = torch.autograd.grad(y, inputs, dy)
    gate, up = (half.chunk(2)[rank] for half in w1.detach().chunk(2))
    mine = leaf(tokens(x)), leaf(gain), torch.nn.Parameter(torch.cat((gate, up))), shard(w2, 1)
    block = Block(linear(mine[2], FORMAT), linear(mine[3], FORMAT), EPS, how)
    got_y = mlp(*mine[:2], block)
    check("mlp output", got_y, tokens(y))
    got = torch.autograd.grad(got_y, mine, tokens(dy))
    check("mlp x", got[0], tokens(want[0]))
    check("mlp gain", whole_gradient(got[1].float(), True), want[1].float())
    dgate, dup = (half.chunk(2)[rank] for half in want[2].chunk(2))
    check("mlp fc1", got[2], torch.cat((dgate, dup)))
    check("mlp fc2", got[3], want[3].chunk(2, 1)[rank])


if __name__ == "__main__":
    main(sys.argv[1] == "sequence")
