"""On PYTHONPATH of every process of the loop where there is no GPU: slime gets an accelerator called `cpu`.

slime has a registry for accelerators (slime/utils/accelerator); nothing of it is replaced.
"""

import os
from types import ModuleType

from megatron_fp8_ext.megatron_plugin import import_hook


def register(module: ModuleType) -> None:
    import torch

    class CPUAccelerator(module.Accelerator):
        name = device_type = "cpu"
        communication_backend_name = "gloo"

        def is_available(self):
            return True

        def device(self, index=None):
            return torch.device("cpu")

        def device_name(self, index=None):
            return "cpu"

        def current_device(self):
            return "cpu"

        def device_count(self):
            return 1

        def mem_get_info(self, device=None):
            return 0, 0

        def memory_allocated(self, device=None):
            return 0

        memory_reserved = memory_allocated

        def set_device(self, index):
            pass

        def synchronize(self, device=None):
            pass

        def empty_cache(self):
            pass

        def current_stream(self, device=None):
            return None

        def distributed_device_id(self, index=None):
            return None

    module.register_accelerator("cpu", CPUAccelerator, communication_backends=("gloo",))


if os.environ.get("SLIME_ACCELERATOR") == "cpu":
    import_hook.install()
    import_hook.after_import("slime.utils.accelerator", register)
