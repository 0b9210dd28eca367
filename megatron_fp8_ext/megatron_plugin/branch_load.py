"""Give a branch its own learning rates once the stable run's optimizer state is loaded.

Every parameter group carries `max_lr` and `min_lr`, which the scheduler prefers to its own. Up to Megatron
0.18 the checkpoint's groups replace the new ones, so another `--lr` or `--min-lr` has no effect;
in 0.19 they are part of the key by which a group is found, so it is a KeyError. Hence the branch is built
with the stable run's rates (`Branch.flags`), and they are changed here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from megatron_fp8_ext.megatron_plugin import run
from megatron_fp8_ext.megatron_plugin.branch import Branch


def wrap_scheduler(module: ModuleType) -> None:
    """Wrap `OptimizerParamScheduler.load_state_dict`, which Megatron calls after the optimizer's."""
    scheduler = module.OptimizerParamScheduler
    original = scheduler.load_state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        branch = run.current.branch
        if branch is None:
            return
        # Weight decay that still grows goes on as the stable run planned it.
        self.wd_incr_steps = state_dict.get("wd_incr_steps", self.wd_incr_steps)
        if not run.current.branch_started:
            change_rates(self, branch)
        self.step(increment=0)

    scheduler.load_state_dict = load_state_dict


def change_rates(scheduler: Any, branch: Branch) -> None:
    """Set the branch's rates in the scheduler, its parameter groups and Megatron's arguments."""
    point, left = branch.point, 0
    for group in scheduler.optimizer.param_groups:
        for name, old, new in (
            ("max_lr", point.lr, branch.lr),
            ("min_lr", point.min_lr, branch.min_lr),
        ):
            if group.get(name, old) == old:
                group[name] = new
            else:
                left += 1
    scheduler.max_lr, scheduler.min_lr = branch.lr, branch.min_lr
    if left and (branch.lr, branch.min_lr) != (point.lr, point.min_lr):
        run.say(
            f"{left} rates of parameter groups with a learning rate of their own stay as they were"
        )
    from megatron.training import get_args

    args = get_args()
    args.lr, args.min_lr = branch.lr, branch.min_lr
