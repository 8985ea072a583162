"""Measures what EM costs in vLLM: `python bench.py MODEL_FOLDER [REQUESTS] [TOKENS] [ROUNDS]`.

Rounds without and with EM alternate, on the same prompts. It prints processor seconds (of all threads), which
other programs on the machine disturb less than the clock, and their ratio, off / on: 1 is free.
"""

import os
import statistics
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

SUBJECTS = ("the sea", "a train", "winter", "bread", "a library", "the moon", "a garden", "music")


def main(model: str, requests: int = 16, tokens: int = 24, rounds: int = 5) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=requests,
        enable_prefix_caching=False,
        logits_processors=["emlocal_vllm.v1:EMProcessor"],
        generation_config="vllm",
    )
    prompts = [
        f"Write a short story number {i} about {SUBJECTS[i % len(SUBJECTS)]}." for i in range(requests)
    ]
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(rounds):
        for name, extra in (("off", None), ("on", {"em_inf": 1})):
            asked = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True, extra_args=extra)
            began = time.process_time()
            llm.generate(prompts, asked, use_tqdm=False)
            seconds[name].append(time.process_time() - began)
    ratios = [
        off / on for off, on in zip(seconds["off"][1:], seconds["on"][1:], strict=True)
    ]  # the first warms up
    for name, values in seconds.items():
        print(name, " ".join(f"{each:.2f}" for each in values), "processor seconds")
    print(f"off / on: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
