"""emlocal's EM steps in vLLM: `emlocal_vllm.v1:EMProcessor` and `emlocal_vllm.v2:EMProcessor`.

Which one fits depends on vLLM's model runner: V2 on GPUs, V1 on CPUs (docs/scale.md). The package needs torch
alone. It has no entry point, so vLLM loads it only if it is told to: with speculative decoding, the V1 runner
drops entry points without a word, and refuses a named processor.

    steps    the EM steps on rows of logits, on the device, without asking the host
    draw     emlocal's addressed uniforms and its draw, on the device
    request  the fields of a request, with ranges and defaults
    table    what the requests of a batch ask for, and one step over the batch
    v1, v2   vLLM's two interfaces
    worker   reads the entropies back, offline
"""
