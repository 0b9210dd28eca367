"""A stand-in for one SGLang engine and its router: slime's HTTP calls, answered by transformers on the CPU.

python -m rl_loop.server MODEL --port PORT [--fault ...]

MODEL is a block-FP8 checkpoint folder. The server starts with random weights, as SGLang does under `--load-format
dummy`: until the trainer pushes, it can only talk nonsense. A push (`/update_weights_from_disk`) gives it FP8 codes and
scales, and its linear layers compute with these: codes times scales, inputs cast to FP8 row by row in the same scale
format, sums in FP32, as an FP8 engine does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from transformers import AutoConfig, Qwen2ForCausalLM

from megatron_fp8_ext.fp8 import reference
from rl_loop import arithmetic

FAULTS = ("none", "ignore-push", "corrupt-push", "hang", "die")
BATCH = 256
INTO_A_ROLLOUT = (
    20  # requests after a push that are answered before a fault: some of a rollout's 128
)


class FP8Linear(torch.nn.Module):
    """`y = x W^T + b` of a served FP8 layer; its weight arrives by a push."""

    def __init__(self, linear: torch.nn.Linear, scale_format: str) -> None:
        super().__init__()
        # What the codes stand for, exactly, in FP32.
        self.weight = torch.randn(linear.weight.shape) * 0.02
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.scale_format = scale_format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        cast = reference.quantize_rows(rows.to(torch.bfloat16), self.scale_format).dequantize()
        y = cast @ self.weight.t()
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@dataclass
class Request:
    """One sequence to continue.

    Attributes:
        prompt: token ids.
        temperature: above 0 samples, 0 takes the likeliest.
        limit: new tokens at most.
        seed: of this sequence's draws.
        answer: set when `done`: (tokens, log-probabilities, "stop" or "length").
    """

    prompt: list[int]
    temperature: float
    limit: int
    seed: int
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[list[int], list[float], str] | None = None


class Engine:
    """The model, and one thread that generates for whoever waits."""

    def __init__(self, folder: Path, fault: str, after: int) -> None:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        quantization = config.quantization_config
        del config.quantization_config
        self.scale_format = (
            "power_of_two" if quantization.get("scale_fmt") == "ue8m0" else "float32"
        )
        self.model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                parent, _, last = name.rpartition(".")
                replacement = FP8Linear(module, self.scale_format)
                setattr(self.model.get_submodule(parent), last, replacement)
        self.fault, self.after = fault, after
        self.version = "none"
        self.served = self.since_push = 0
        self.pushes = 0
        self.lock = threading.Lock()
        self.waiting: queue.Queue[Request] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def load(self, folder: Path, version: str) -> None:
        """Take the weights of a pushed checkpoint folder."""
        self.pushes += 1
        self.since_push = 0
        if self.fault == "ignore-push":
            self.version = version
            return
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
        with self.lock, torch.no_grad():
            expected = dict(self.model.named_parameters())
            for name in list(tensors):
                if not name.endswith("_scale_inv"):
                    continue
                key = name.removesuffix("_scale_inv")
                codes, scale_inv = tensors.pop(key), tensors.pop(name)
                if self.fault == "corrupt-push" and self.pushes > self.after:
                    # One layer's scales in another order: what a wrong layout does.
                    scale_inv = scale_inv * 2 if "down_proj" in key else scale_inv
                block = (reference.BLOCK, reference.BLOCK)
                layer = self.model.get_submodule(key.removesuffix(".weight"))
                layer.weight = reference.Quantized(codes, scale_inv, block).dequantize()
                if f"{key.removesuffix('.weight')}.bias" in tensors:
                    layer.bias = tensors.pop(f"{key.removesuffix('.weight')}.bias").float()
            missing = set(expected) - set(tensors)
            if missing or set(tensors) - set(expected):
                raise ValueError(f"push {version}: tensors do not fit the model: {missing}")
            for name, value in tensors.items():
                expected[name].copy_(value)
            self.version = version

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            time.sleep(0.01)  # the rest of a group comes within milliseconds
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get())
            with self.lock:
                self._generate(batch)
            for request in batch:
                request.done.set()

    @torch.no_grad()
    def _generate(self, batch: list[Request]) -> None:
        """Continue all sequences together, prompts padded on the left."""
        longest = max(len(r.prompt) for r in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(batch):
            tokens[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        draws = [torch.Generator().manual_seed(request.seed) for request in batch]
        out: list[tuple[list[int], list[float]]] = [([], []) for _ in batch]
        open_rows = set(range(len(batch)))
        cache, step = None, tokens
        end = arithmetic.VOCABULARY[arithmetic.EOS]
        temperature = torch.tensor([r.temperature or 1.0 for r in batch])[:, None]
        while open_rows:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
            result = self.model(
                input_ids=step, attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = result.past_key_values
            log_probs = torch.log_softmax(result.logits[:, -1].float() / temperature, -1)
            noise = torch.stack([torch.rand(log_probs.shape[1], generator=g) for g in draws])
            gumbel = log_probs - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
            greedy = torch.tensor([r.temperature == 0 for r in batch])[:, None]
            chosen = torch.where(greedy, log_probs, gumbel).argmax(1)
            for row in list(open_rows):
                token = int(chosen[row])
                out[row][0].append(token)
                out[row][1].append(float(log_probs[row, token]))
                stopped = token == end
                if stopped or len(out[row][0]) >= batch[row].limit:
                    batch[row].answer = (*out[row], "stop" if stopped else "length")
                    open_rows.discard(row)
            step = chosen[:, None]
            mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.long)], 1)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Serve one `/generate`."""
        self.served += 1
        self.since_push += 1
        if self.pushes > self.after and self.since_push > INTO_A_ROLLOUT:
            if self.fault == "die":
                os._exit(1)
            if self.fault == "hang":
                threading.Event().wait()
        params = body["sampling_params"]
        key = json.dumps([body["input_ids"], params.get("sampling_seed", 0), self.version])
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        request = Request(
            body["input_ids"], float(params["temperature"]), int(params["max_new_tokens"]), seed
        )
        self.waiting.put(request)
        request.done.wait()
        assert request.answer is not None
        ids, log_probs, reason = request.answer
        names = {number: text for text, number in arithmetic.VOCABULARY.items()}
        special = (arithmetic.EOS, arithmetic.PAD)
        text = "".join(names.get(i, "?") for i in ids if names.get(i) not in special)
        return {
            "text": text,
            "output_ids": ids,
            "meta_info": {
                "id": str(self.served),
                "finish_reason": {"type": reason},
                "output_token_logprobs": [
                    [p, i, None] for p, i in zip(log_probs, ids, strict=True)
                ],
                "prompt_tokens": len(request.prompt),
                "completion_tokens": len(ids),
                "weight_version": self.version,
            },
        }


class Handler(BaseHTTPRequestHandler):
    """SGLang's endpoints that slime calls, and the router's `/workers`."""

    engine: Engine
    workers: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, body: Any, code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        engine, path = self.engine, urlsplit(self.path).path
        if path == "/health_generate":
            # A real generation, as SGLang's: a hung engine does not answer.
            params = {"temperature": 0.0, "max_new_tokens": 1}
            engine.since_push -= 1
            engine.answer({"input_ids": arithmetic.encode("1+1="), "sampling_params": params})
            self._send({})
        elif path in ("/health", "/flush_cache"):
            self._send({})
        elif path == "/server_info":
            self._send({"tp_size": 1, "pp_size": 1, "enable_memory_saver": False})
        elif path == "/workers":
            self._send({"workers": [{"id": str(i), "url": u} for i, u in enumerate(self.workers)]})
        elif path == "/v1/loads":
            self._send({"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]})
        elif path == "/get_weight_version":
            self._send({"weight_version": engine.version})
        else:
            self._send({"error": path}, 404)

    def do_POST(self) -> None:
        engine, path = self.engine, urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if path == "/generate":
            self._send(engine.answer(body))
        elif path == "/workers":
            self.workers.append(body["url"])
            self._send({})
        elif path == "/update_weights_from_disk":
            try:
                engine.load(Path(body["model_path"]), str(body["weight_version"]))
            except (OSError, ValueError, AttributeError) as error:
                self._send({"success": False, "message": str(error)}, 400)
                return
            self._send({"success": True, "message": ""})
        elif path in ("/pause_generation", "/continue_generation", "/abort_request"):
            self._send({"success": True})
        else:
            self._send({"error": path}, 404)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--after", type=int, default=0, help="pushes before the fault")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    Handler.engine, Handler.workers = Engine(chosen.model, chosen.fault, chosen.after), []
    ThreadingHTTPServer.request_queue_size = 1024  # slime opens hundreds of connections at once
    server = ThreadingHTTPServer(("127.0.0.1", chosen.port), Handler)
    server.daemon_threads = True
    print(f"listening on 127.0.0.1:{chosen.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
