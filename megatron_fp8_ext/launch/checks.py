"""What would stop a run, found before it starts, all at once, each with its mend."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch import secrets
from megatron_fp8_ext.launch.plan import Plan, split_checkpoint
from megatron_fp8_ext.megatron_plugin import arguments, checks


def problems(plan: Plan) -> list[str]:
    """Return everything that would stop the run, one line each: what is wrong, and the mend."""
    missing = dict(plan.missing)
    if "branch" in missing:
        missing.pop("branch-step", None)  # --init says both
    found = [_missing(name, flag) for name, flag in missing.items()]
    wrong = _numbers(plan)
    found += wrong or [*_sizes(plan), *_lengths(plan)]
    return [*found, *_files(plan), *_trainer(plan), *_secrets(plan)]


# What the checks below compute with.
_NUMBERS = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
    "--num-attention-heads", "--num-query-groups", "--num-layers", "--hidden-size", "--ffn-hidden-size",
    "--kv-channels", "--global-batch-size", "--micro-batch-size", "--seq-length",
    "--max-position-embeddings", "--max-tokens-per-gpu", "--rollout-max-response-len",
    "--rollout-num-gpus-per-engine",
)  # fmt: skip


def _numbers(plan: Plan) -> list[str]:
    found = []
    for flag in _NUMBERS:
        try:
            if plan.number(flag, 1) < 1:
                found.append(f"{flag} {plan.value(flag)}: must be at least 1")
        except UserError as error:
            found.append(str(error))
    return found


def _missing(name: str, flag: str) -> str:
    what = {
        "data": "the training data",
        "model": "the model folder (config.json and tokenizer)",
        "init": "the checkpoint to start from",
        "branch": "the stable checkpoint to branch from (DIR/iter_NNNNNNN)",
        "branch-step": "the iteration of the stable checkpoint (DIR/iter_NNNNNNN)",
    }.get(name, name)
    return f"{what} is not given: add {flag} ..."


def _sizes(plan: Plan) -> list[str]:
    """Parallel sizes against the GPUs, the heads, the layers and the batch."""
    tp = plan.number("--tensor-model-parallel-size")
    pp = plan.number("--pipeline-model-parallel-size")
    cp = plan.number("--context-parallel-size")
    world, found = plan.world_size, []
    if world % (tp * pp * cp):
        found.append(
            f"{plan.nodes} nodes x {plan.gpus} GPUs = {world} ranks is no multiple of TP {tp} x PP {pp} "
            f"x CP {cp} = {tp * pp * cp}: change --nodes, --gpus or --set tensor-model-parallel-size=..."
        )
    for flag, parts, name in (
        ("--num-attention-heads", tp, "TP"),
        ("--num-query-groups", tp, "TP"),
        ("--num-layers", pp, "PP"),
    ):
        size = plan.number(flag, 0)
        if size % parts:
            good = [str(n) for n in range(1, size + 1) if size % n == 0 and n <= world]
            found.append(
                f"{flag} {size} is not divisible by {name} {parts}: use one of {', '.join(good)}"
            )
    batch, mbs = plan.number("--global-batch-size", 0), plan.number("--micro-batch-size", 1)
    dp = max(world // (tp * pp * cp), 1)
    if plan.trainer == "megatron" and batch and batch % (mbs * dp):
        low, high = checks.nearest_multiples(batch, mbs * dp)
        found.append(
            f"--global-batch-size {batch} is no multiple of --micro-batch-size {mbs} x {dp} data-parallel "
            f"ranks: use {low} or {high}"
        )
    if plan.trainer == "slime" and "--colocate" in plan.argv:
        found += _engine(plan)
    return found


def _engine(plan: Plan) -> list[str]:
    """SGLang shards block-scaled weights at multiples of 128 only, unlike the trainer."""
    tp = plan.number("--rollout-num-gpus-per-engine")
    heads, hidden = plan.number("--num-attention-heads"), plan.number("--hidden-size")
    rows = plan.number("--kv-channels", hidden // heads) * plan.number("--num-query-groups", heads)
    bad = [
        f"{name} {size}"
        for name, size in (("key/value rows", rows), ("FFN size", plan.number("--ffn-hidden-size")))
        if size % (tp * 128)
    ]
    if not bad:
        return []
    return [
        f"--rollout-num-gpus-per-engine {tp}: {' and '.join(bad)} over {tp} GPUs is no multiple of 128, "
        "which SGLang refuses for block-scaled FP8: use a smaller number"
    ]


def _lengths(plan: Plan) -> list[str]:
    """Sequence lengths against FP8 blocks, context parallelism and packing."""
    cp = plan.number("--context-parallel-size")
    if plan.trainer == "slime":
        slab, answer = (
            plan.number("--max-tokens-per-gpu", 0),
            plan.number("--rollout-max-response-len", 0),
        )
        found = []
        if slab % 128:
            low, high = checks.nearest_multiples(slab, 128)
            found.append(f"--max-tokens-per-gpu {slab} is no multiple of 128: use {low} or {high}")
        if answer > slab * cp:
            found.append(
                f"--rollout-max-response-len {answer} does not fit --max-tokens-per-gpu {slab} x CP {cp}: "
                f"raise the latter to {answer // cp} or more"
            )
        return found
    seq, positions = plan.number("--seq-length", 0), plan.number("--max-position-embeddings", 0)
    if not seq:
        return ["--seq-length is not set: add --set seq-length=..."]
    found = []
    if positions < seq:
        found.append(
            f"--max-position-embeddings {positions} is below --seq-length {seq}: "
            f"--set max-position-embeddings={seq}"
        )
    if cp > 1 and seq % (2 * cp):
        low, high = checks.nearest_multiples(seq, 2 * cp)
        found.append(f"--seq-length {seq} is no multiple of 2 x CP {cp}: use {low} or {high}")
    if plan.recipe is not None and plan.recipe.is_fp8:
        args = SimpleNamespace(
            seq_length=seq,
            tensor_model_parallel_size=plan.number("--tensor-model-parallel-size"),
            context_parallel_size=cp,
            micro_batch_size=plan.number("--micro-batch-size"),
            sequence_parallel=arguments.has(plan.argv, "--sequence-parallel"),
            hidden_size=plan.number("--hidden-size", 0) or None,
            ffn_hidden_size=plan.number("--ffn-hidden-size", 0) or None,
        )
        try:
            checks.shapes_fit_fp8(args, plan.recipe.name, plan.world_size)
        except UserError as error:
            found.append(str(error))
    return found


def _files(plan: Plan) -> list[str]:
    """Inputs that are not there, and an output that cannot be written."""
    inputs, found = plan.request.inputs, []
    data = inputs.get("data", "")
    if data and plan.request.preset.stage.startswith("cpt"):
        try:
            checks.corpus_exists(SimpleNamespace(data_path=data.split()))
        except UserError as error:
            found.append(str(error))
    elif data and not Path(data).exists():
        found.append(f"--data {data} does not exist: give the file or folder of training samples")
    elif data and arguments.has(plan.argv, "--sft-data"):
        found += _packed(plan, Path(data))
    if (
        plan.request.preset.stage == "cpt"
        and "init" not in inputs
        and not plan.request.from_scratch
    ):
        if plan.facts.saved_iteration is None:
            found.append(
                "continual pre-training without a checkpoint to continue from starts from random weights: "
                "add --init DIR (made by `megatron-fp8 convert hf-to-megatron MODEL DIR`), or --from-scratch"
            )
    if "init" in inputs:
        root, step = split_checkpoint(inputs["init"])
        folder = Path(root) if step is None else Path(root) / f"iter_{step:07d}"
        if not folder.is_dir():
            found.append(
                f"--init {inputs['init']}: {folder} is not there; give a checkpoint folder"
            )
        elif step is None and plan.facts.init_iteration is None:
            found.append(
                f"--init {root} holds no checkpoint (no latest_checkpointed_iteration.txt)"
            )
        elif plan.request.preset.stage != "cpt-decay" and step is not None:
            if plan.facts.init_iteration != step:
                found.append(
                    f"--init {inputs['init']}: Megatron starts from the last checkpoint of a folder, here "
                    f"{plan.facts.init_iteration}; give --init {root}, or convert that iteration by itself"
                )
    model = inputs.get("model")
    if model and plan.facts.config is None:
        found.append(
            f"--model {model}: no readable config.json there; give a model folder in Hugging Face format"
        )
    place = Path(plan.output)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        found.append(f"--output {plan.output} cannot be written ({place}): choose another folder")
    return found


def _packed(plan: Plan, folder: Path) -> list[str]:
    """Packed samples against the length and the alignment of a pack."""
    if not (folder / "index.json").is_file():
        return [
            f"--data {folder} is no folder of packed samples: write one with `megatron-fp8 data pack "
            f"SAMPLES.jsonl --tokenizer MODEL --seq-length {plan.value('--seq-length')} --output DIR`"
        ]
    try:
        from megatron_fp8_ext.sft.shards import SampleShards
    except ImportError:  # without numpy: the nodes that train have it, and check again
        return []
    try:
        data, seq = SampleShards(folder), plan.number("--seq-length", 0)
        sequence_parallel = arguments.has(plan.argv, "--sequence-parallel")
        tp = plan.number("--tensor-model-parallel-size") if sequence_parallel else 1
        multiple = 128 * tp * plan.number("--context-parallel-size")
    except UserError as error:
        return [str(error)]
    found = []
    if len(data) and data.longest > seq:
        found.append(
            f"--data {folder}: its longest sample has {data.longest} tokens, --seq-length is {seq}: --set "
            f"seq-length={data.index['seq_length']}, or pack again with a shorter one"
        )
    if seq % multiple:
        low, high = checks.nearest_multiples(seq, multiple)
        found.append(
            f"--seq-length {seq}: packs are multiples of {multiple} tokens here (128 x ranks that split a "
            f"sequence): use {low} or {high}"
        )
    return found


def _trainer(plan: Plan) -> list[str]:
    """What only one of the trainers needs."""
    found = []
    if plan.trainer == "slime":
        if plan.request.slime is None and plan.facts.slime is None:
            found.append(
                "slime is not here: git clone https://github.com/THUDM/slime and add --slime DIR "
                "(PyPI's `slime` is another project)"
            )
        elif plan.request.slime and not (Path(plan.request.slime) / "train.py").is_file():
            found.append(f"--slime {plan.request.slime} holds no train.py: give a slime checkout")
        found += _quantization(plan)
        if plan.launcher == "ray" and plan.request.ray_address is None and plan.nodes > 1:
            found.append(
                f"{plan.nodes} nodes need a Ray cluster of your own: start it and add --ray-address "
                "http://HEAD:8265, or --launcher slurm, or --nodes 1 for this machine alone"
            )
        return found
    script = plan.request.megatron
    if script and not (Path(script) / "pretrain_gpt.py").is_file():
        found.append(f"--megatron {script} holds no pretrain_gpt.py: give a Megatron-LM checkout")
    if arguments.has(plan.argv, "--sft-data") and "infialign" not in registry.names("loss"):
        found.append(
            "trainer=megatron needs the loss 'infialign', which nothing installed provides"
        )
    if plan.launcher == "torchrun" and plan.nodes > 1 and plan.request.rdzv_endpoint is None:
        found.append(f"{plan.nodes} nodes need a place to meet: add --rdzv-endpoint HOST:29400")
    return found


def _quantization(plan: Plan) -> list[str]:
    """The FP8 export that RL serves from, against the scale format it trains with."""
    if plan.request.preset.stage != "rl" or plan.facts.config is None or plan.recipe is None:
        return []
    quantization, recipe = plan.facts.config.get("quantization_config"), plan.recipe
    mixed = arguments.has(plan.argv, "--allow-mixed-rollout")
    if not isinstance(quantization, dict):
        if not recipe.is_fp8 or mixed:
            return []
        scales = "fp32" if recipe.scale_format == "float32" else "e8m0"
        return [
            f"the model is served in BF16 and {recipe.name} trains in FP8: --model wants the folder that "
            f"`megatron-fp8 convert hf-to-fp8 MODEL DIR --scale-format {scales}` writes; "
            "-- --allow-mixed-rollout runs it nevertheless"
        ]
    if not recipe.is_fp8:
        if mixed:
            return []
        return [
            f"the model is served in FP8 and {recipe.name} trains in BF16: --model wants the BF16 folder; "
            "-- --allow-mixed-rollout runs it nevertheless"
        ]
    found = []
    if "fmt" not in quantization:
        found.append(
            "config.json: quantization_config has no fmt, and slime stops at the first weight push: "
            "export again with `megatron-fp8 convert hf-to-fp8`"
        )
    served = str(quantization.get("scale_fmt", "")).lower() in ("ue8m0", "e8m0")
    trained = recipe.scale_format == "power_of_two"
    if served != trained and not mixed:
        kinds = {True: ("power-of-two", "e8m0", "infir2"), False: ("FP32", "fp32", "infir2-rl")}
        found.append(
            f"the model was exported with {kinds[served][0]} scales and {recipe.name} trains with "
            f"{kinds[trained][0]} ones, so that every weight push changes nearly all codes: export with "
            f"--scale-format {kinds[trained][1]}, or --set fp8-recipe={kinds[served][2]}"
        )
    return found


def _secrets(plan: Plan) -> list[str]:
    """Secrets that would end up in a file, or in the record of a Ray job."""
    known = plan.facts.secrets
    found = [
        f"{name}: secrets do not belong into a preset or a file; export it in the shell instead"
        for name, value in plan.environment.items()
        if secrets.is_secret(name) or secrets.mask(value, known) != value
    ]
    if plan.launcher == "torchrun":
        return found
    flag = ""
    for token, shown in zip(plan.argv, secrets.masked(plan.argv, known), strict=True):
        flag = token.split("=")[0] if token.startswith("--") else flag
        if token != shown:
            found.append(f"{flag} would be written into a file: export it as a variable instead")
    return found
