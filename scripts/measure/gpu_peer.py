"""The `nano` workload through transformers on the same card; the one script that needs torch."""

import time
from typing import Any

import numpy as np
import torch
import transformers
from gpu_common import SHAPES, Report, nano_requests


def check_peer(small: bool, name: str, limit_s: float, report: Report) -> None:
    """The same lengths through transformers' continuous batching, random weights of the shape.

    What is not finished after `limit_s` is cut off; its tokens so far count.
    """
    shape = dict(SHAPES[name])
    config = transformers.Qwen3Config(
        vocab_size=512 if small else shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=128 if small else shape["intermediate_size"],
        num_hidden_layers=2 if small else shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_position"],
        tie_word_embeddings=shape["tie_embeddings"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    generation: Any = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
    requests = nano_requests(small, config.vocab_size, seed=0)
    with torch.no_grad():
        manager = model.init_continuous_batching(generation_config=generation)
        manager.warmup()
        manager.start()
        start = time.perf_counter()
        for index, (prompt, length) in enumerate(requests):
            manager.add_request(prompt, str(index), max_new_tokens=length, record_timestamps=True)
        seen: dict[str, list[float]] = {}
        unfinished = len(requests)
        while unfinished and time.perf_counter() - start < limit_s:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    break
                continue
            seen[result.request_id] = list(result.timestamps or [])
            unfinished -= 1
        wall = time.perf_counter() - start
        for request_id, state in manager.batch_processor.scheduler.active_requests.items():
            seen[request_id] = list(state.timestamps or [])
        attention = model.config._attn_implementation
        manager.stop(block=True, timeout=5)
        manager.destroy()
    stamps = [times for times in seen.values() if times]
    per_token = [(t[-1] - t[0]) / (len(t) - 1) for t in stamps if len(t) > 1]
    report.add(
        engine=f"transformers {transformers.__version__}",
        attention=attention,
        model=name,
        wall_s=wall,
        unfinished=unfinished,
        output_tokens_per_s=sum(len(t) for t in stamps) / wall,
        mean_ttft_s=float(np.mean([t[0] - start for t in stamps])) if stamps else None,
        mean_tpot_ms=float(np.mean(per_token)) * 1e3 if per_token else None,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    )
