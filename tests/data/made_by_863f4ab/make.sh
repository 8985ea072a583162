#!/bin/sh
# Run here with a checkout of 863f4ab on PYTHONPATH: makes the files that later versions must know again.
# tiny.gguf is what tests.tiny_gguf.write_tiny_gguf wrote then.
set -e
HERE="-m tiny.gguf --threads 1 -q"
SMALL="--steps 4 --prompts-per-step 2 --max-tokens 6 --rank 1 --target-modules q_proj --dtype float32
 --save-every 2 --device cpu --rollouts llama.cpp --parallel 2 --context 64
 --max-length-change 1000 --max-repetition 1 --max-kl 0 --entropy-floor 0"
python -m emlocal batch in.jsonl -o batch.jsonl $HERE --raw --em-inf --seed 3 --max-tokens 5 --context 64
python -m emlocal finetune $HERE --data data.jsonl -o finetune $SMALL --validate data.jsonl
python -m emlocal rl $HERE --data data.jsonl -o rl $SMALL --samples 2
python -m emlocal eval $HERE --task questions --data data.jsonl --methods greedy,sample --max-tokens 5 \
    --parallel 2 --context 200 -o eval
rm -f */.lock eval/report.html eval/results.* eval/made_with.jsonl
